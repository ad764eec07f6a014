"""`BnbExperts`: the routed experts in 4 or 8 bits as bitsandbytes packs them, frozen, under LoRA where asked.

Special about it: the two stacks are widened for their product and dropped, in the backward again, and of the experts
those alone that a token reaches. What is stored are buffers; the parameters `gate_up_proj` and `down_proj` have a
stack's shape and device and no memory, which is what PEFT's `target_parameters`, parameter counts and device
maps look at. Low-rank factors of adapters multiply beside the packed stack, each in its own product.

Letters: n tokens, K experts a token, P = n * K pairs, E experts, D hidden, F expert width, N rows, r rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..kernels import grouped_gemm
from .adapted import Factors, Stacks, Widened, adapters_on, frozen_experts, frozen_product
from .bnb_packing import Packing

STACKS = ("gate_up_proj", "down_proj")
# With so many pairs an expert on average nearly all are reached; asking which would make the host wait.
_MANY_ROWS = 4

_DATA = vars(torch._C.TensorBase)["data"].__get__

_REMEDY = (
    "the routed experts are packed by bitsandbytes, and an adapter cannot be merged into them. Load the base in BF16, "
    "the adapter over it, and merge there (deepseek-v3 finetune --merge does), or call model.dequantize() before "
    "get_peft_model"
)


class StackShape(nn.Parameter):
    """Shape, dtype and device of a packed stack. It takes no memory, and whoever reads its numbers finds NaN.

    PEFT puts a sum of it and a delta in its place for the time of a forward; that sum is never computed.
    """

    def __new__(cls, like: torch.Tensor, requires_grad: bool = False) -> "StackShape":
        nothing = torch.full((), float("nan"), dtype=like.dtype, device=like.device)
        return torch.Tensor._make_subclass(cls, nothing.expand(like.shape), False)

    @classmethod
    def of(cls, shape: torch.Size, dtype: torch.dtype, device: Any) -> "StackShape":
        """The shape of a stack that is nowhere."""
        return cls(torch.empty((), dtype=dtype, device=device).expand(shape))

    def element_size(self) -> int:
        return 0

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StackShape({list(self.shape)}, {self.dtype}, {self.device})"

    def __deepcopy__(self, memo: Any) -> "StackShape":
        return StackShape(self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, itself = getattr(func, "__name__", ""), args[0] if args else None
        if isinstance(itself, cls):
            if name in ("add", "baddbmm") or func == _DATA:
                return itself
            if name in ("__iadd__", "add_", "__isub__", "sub_", "clone"):
                raise ValueError(_REMEDY)
            if name == "to":
                # Torch would write out what only has a shape.
                with torch._C.DisableTorchFunctionSubclass():
                    like = itself[(0,) * itself.dim()].to(*args[1:], **(kwargs or {}))
                return cls.of(itself.shape, like.dtype, like.device)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def stack_shapes(model: nn.Module) -> list[str]:
    """Names of the parameters of `model` that are shapes alone."""
    return [name for name, parameter in model.named_parameters() if isinstance(parameter, StackShape)]


class BnbExperts(Stacks):
    """E SwiGLU experts, packed.

    Attributes:
        gate_up_proj, down_proj: the shapes [E, 2F, D] (gate rows first) and [E, D, F] of what is packed, as float32.
            Until the experts are packed, ordinary parameters of these shapes.
        gate_up_proj_codes and further buffers with the stack's name before them: see `Packing.sizes`, with E in front.
        compute_dtype: what products run in; None for the dtype of the tokens.
    """

    # What `model.dequantize()` makes of it again: called with the model's configuration.
    plain_class: Any = None

    # Read by transformers' expert parallelism.
    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True

    def __init__(self, plain: nn.Module, packing: Packing, compute_dtype: torch.dtype | None, packed: bool) -> None:
        """
        Args:
            plain: fused experts of the same sizes.
            packing: how.
            compute_dtype: see above.
            packed: what will be loaded is packed already.
        """
        super().__init__()
        experts: Any = plain
        self.num_experts, self.hidden_dim = experts.num_experts, experts.hidden_dim
        self.intermediate_dim, self.act_fn = experts.intermediate_dim, experts.act_fn
        self.plain_class = type(plain)
        self.packing, self.compute_dtype = packing, compute_dtype
        for name in STACKS:
            stack = getattr(plain, name)
            self.register_parameter(name, nn.Parameter(stack.detach(), requires_grad=False))
            if packed:
                self.reserve(name, stack.device)

    def shape(self, name: str) -> tuple[int, int]:
        """Rows and columns of one expert's matrix in the stack `name`."""
        if name == "gate_up_proj":
            return 2 * self.intermediate_dim, self.hidden_dim
        return self.hidden_dim, self.intermediate_dim

    def packed(self, name: str) -> bool:
        """Whether the stack `name` is."""
        return f"{name}_codes" in self._buffers

    def reserve(self, name: str, device: Any) -> None:
        """Make the buffers for the stack `name`, not filled in, and let go of the parameter's memory."""
        rows, columns = self.shape(name)
        for suffix, (shape, dtype) in self.packing.sizes(rows, columns).items():
            buffer = torch.empty((self.num_experts, *shape), dtype=dtype, device=device)
            self.register_buffer(f"{name}_{suffix}", buffer)
        shape = torch.Size((self.num_experts, rows, columns))
        # PEFT casts an adapter's factors to the dtype of what it adapts.
        self._parameters[name] = StackShape.of(shape, torch.float32, device)

    def put(self, name: str, expert: int, matrix: torch.Tensor) -> None:
        """Pack one expert's matrix [N, K] into its place."""
        for suffix, part in self.packing.pack(matrix).items():
            self._buffers[f"{name}_{suffix}"][expert].copy_(part)  # type: ignore[index]

    def widened(self, name: str, dtype: torch.dtype, experts: torch.Tensor | None = None) -> torch.Tensor:
        """The matrices [E, N, K] that are packed, of all experts or of those whose numbers are given."""
        rows, columns = self.shape(name)
        parts: Any = {suffix: self._buffers[f"{name}_{suffix}"] for suffix in self.packing.sizes(rows, columns)}
        return self.packing.unpack(parts, rows, columns, dtype, experts)

    def plain(self, config: Any, dtype: torch.dtype) -> nn.Module:
        """The experts with the weights that are packed, in `dtype`, not packed any more."""
        with torch.device("meta"):
            experts: nn.Module = self.plain_class(config)
        for name in STACKS:
            setattr(experts, name, nn.Parameter(self.widened(name, dtype)))
        return experts.train(self.training)

    def nbytes(self) -> int:
        """Bytes that codes and maxima take."""
        return sum(buffer.nbytes for buffer in self.buffers(recurse=False))

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        factors: dict[str, Factors] | None = None,
    ) -> torch.Tensor:
        """Weighted sum of each token's experts.

        Args:
            hidden_states: [n, D]; top_k_index: [n, K]; top_k_weights: [n, K].
            factors: changes to the stacks by name, which multiply beside what is packed.

        Returns:
            [n, D] of the dtype of `hidden_states`.

        Raises:
            ValueError: something other than LoRA parametrises a packed stack.
        """
        dtype, changes = self.compute_dtype or hidden_states.dtype, factors or {}

        def stack(name: str, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
            return self._stack(name, rows, offsets, changes.get(name))

        return frozen_experts(self, stack, hidden_states, top_k_index, top_k_weights, dtype)

    def _stack(self, name: str, rows: torch.Tensor, offsets: torch.Tensor, factors: Factors | None) -> torch.Tensor:
        """Product of rows sorted by expert with one stack, and with what adapters add to it."""

        # Kept until the gradient has come: the rows themselves would be kept with it, past activation checkpointing.
        many = len(rows) >= _MANY_ROWS * self.num_experts

        def widen(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
            if many:
                return self.widened(name, dtype), offsets
            hit = (offsets[1:] > offsets[:-1]).nonzero()[:, 0]
            hit = hit if len(hit) else hit.new_zeros(1)
            return self.widened(name, dtype, hit), torch.cat([offsets[hit], offsets[-1:]])

        result = frozen_product(rows, Widened(widen), offsets, factors)
        for adapter in adapters_on(self, name):
            result = result + grouped_gemm(rows, _delta(adapter).to(rows.dtype), offsets)
        return result

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        shapes = {name: self._parameters.pop(name) for name in STACKS if self.packed(name)}
        stored = {id(buffer) for buffer in self._buffers.values()}

        def guarded(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in stored:
                return fn(tensor)
            # As integers they are moved like any other tensor and cast by nothing.
            return fn(tensor.view(torch.uint8)).view(tensor.dtype)

        result = super()._apply(guarded, recurse)
        for name, old in shapes.items():
            codes: Any = self._buffers[f"{name}_codes"]
            self._parameters[name] = StackShape.of(old.shape, old.dtype, codes.device)  # type: ignore[union-attr]
        return result

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        for name in STACKS:
            if self.packed(name):
                destination.pop(prefix + name, None)

    def _load_from_state_dict(self, *args: Any) -> None:
        shapes = {name: self._parameters.pop(name) for name in STACKS if self.packed(name)}
        super()._load_from_state_dict(*args)  # type: ignore[call-arg]
        self._parameters.update(shapes)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, {self.hidden_dim}, {self.intermediate_dim}, {self.packing.label}"


def _delta(adapter: Any) -> torch.Tensor:
    """The change [E, N, K] that PEFT's parametrisation holds, whole or as factors."""
    if hasattr(adapter, "lhs"):
        return adapter.scaling * adapter.lhs @ adapter.rhs  # type: ignore[no-any-return]
    delta: torch.Tensor | None = getattr(adapter, "delta_weight", None)
    if delta is None:
        raise ValueError(
            f"{type(adapter).__name__} changes experts that are packed by bitsandbytes, which only LoRA can adapt. "
            "Load the model without a quantization_config"
        )
    return delta
