"""`FP8Config`: the published `quantization_config` of FP8 files, and what to do with such a file on loading.

Special about it: in memory the method has a name of its own, so that transformers picks this package's quantiser and
never its own FP8 linear; on disk it is the published "fp8". Keys that nobody here knows are written back as read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..configuration.configuration_deepseek_v3 import FP8_METHOD
from ..configuration.layout import FP8_BLOCK

COMPUTE = (None, "weight_only", "dynamic")


class FP8Config(QuantizationConfigMixin):
    """What becomes of FP8 weights: `from_pretrained(folder, quantization_config=FP8Config(keep=True))`.

    Args:
        keep: True keeps codes and scales in memory, on the CPU too; False dequantises them exactly to the model's
            dtype; None keeps them where the device computes FP8 (compute capability 8.9 or newer).
        compute: how a kept matrix multiplies. "weight_only": the matrix is dequantised for the product, which gives
            what the dequantised model gives; "dynamic": activations are quantised in 1 x 128 tiles and the product
            runs in FP8, as in training and in the published inference code. None takes "dynamic" on a GPU of compute
            capability 9.0 or newer, "weight_only" elsewhere.
        fmt, activation_scheme, weight_block_size, scale_fmt: as in the file.
        kwargs: other keys of the file, kept as they are.

    Raises:
        ValueError: another format than E4M3 in 128 x 128 blocks with dynamic activations, an unknown scale_fmt or
            `compute`.
    """

    def __init__(
        self,
        keep: bool | None = None,
        compute: str | None = None,
        *,
        fmt: str = "e4m3",
        activation_scheme: str = "dynamic",
        weight_block_size: Any = (FP8_BLOCK, FP8_BLOCK),
        scale_fmt: str | None = None,
        quant_method: str = "fp8",
        dequantize: bool = False,
        **kwargs: Any,
    ) -> None:
        block = list(weight_block_size) if isinstance(weight_block_size, list | tuple) else weight_block_size
        allowed = {
            "keep": (keep, (None, True, False)),
            "compute": (compute, COMPUTE),
            "fmt": (fmt, ("e4m3", "float8_e4m3fn")),
            "activation_scheme": (activation_scheme, ("dynamic",)),
            "weight_block_size": (block, ([FP8_BLOCK, FP8_BLOCK],)),
            "scale_fmt": (scale_fmt, (None, "ue8m0", "float", "float32")),
            "quant_method": (quant_method, ("fp8", FP8_METHOD)),
        }
        for name, (value, choices) in allowed.items():
            if value not in choices:
                known = " or ".join(map(repr, choices))
                raise ValueError(
                    f"quantization_config[{name!r}] = {value!r}: only {known} can be loaded. Take "
                    "the config.json of the official checkpoint, or convert the weights to BF16"
                )
        self.quant_method: Any = FP8_METHOD
        self.keep = False if dequantize else keep
        self.compute = compute
        self.fmt, self.activation_scheme = fmt, activation_scheme
        self.weight_block_size, self.scale_fmt = block, scale_fmt
        self.other_keys = kwargs
        # What transformers asks while loading; settled by the quantiser.
        self.dequantize = self.keep is False

    def to_dict(self) -> dict[str, Any]:
        """The published dictionary, without what only concerns loading."""
        written = {
            **self.other_keys,
            "activation_scheme": self.activation_scheme,
            "fmt": self.fmt,
            "quant_method": "fp8",
            "weight_block_size": list(self.weight_block_size),
        }
        return written if self.scale_fmt is None else {**written, "scale_fmt": self.scale_fmt}

    def get(self, key: str, default: Any = None) -> Any:
        """As of the dictionary that a config.json has here; transformers does not tell the two apart."""
        return getattr(self, key, default)

    @property
    def activation_scale_fmt(self) -> str | None:
        """The format of the activations' scales: powers of two where the weights' scales are."""
        return self.scale_fmt if self.scale_fmt == "ue8m0" else None


def is_fp8(quantization_config: Any) -> bool:
    """Whether a config's `quantization_config`, dictionary or object, is this package's FP8."""
    if isinstance(quantization_config, dict):
        return quantization_config.get("quant_method") in ("fp8", FP8_METHOD)
    return isinstance(quantization_config, FP8Config)


def requested_config(quantization_config: Any) -> Any:
    """The `FP8Config` that an argument of `from_pretrained` stands for; anything else but FP8 unchanged.

    transformers' own FP8 configuration is understood, so that no second FP8 linear gets into a model.
    """
    if quantization_config is None or isinstance(quantization_config, FP8Config):
        return quantization_config
    values = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
    method = getattr(values.get("quant_method"), "value", values.get("quant_method"))
    if method not in ("fp8", FP8_METHOD):
        return quantization_config
    return FP8Config(**{**values, "quant_method": "fp8"})


_REQUEST: ContextVar[Any] = ContextVar("fp8_request", default=None)


@contextmanager
def requesting(config: Any) -> Iterator[None]:
    """Make `config` the request of everything that is loaded meanwhile.

    transformers lets an argument change the file's configuration for its own classes only.
    """
    token = _REQUEST.set(config if isinstance(config, FP8Config) else None)
    try:
        yield
    finally:
        _REQUEST.reset(token)


def request() -> FP8Config | None:
    """The `FP8Config` that the running `from_pretrained` was given."""
    return _REQUEST.get()
