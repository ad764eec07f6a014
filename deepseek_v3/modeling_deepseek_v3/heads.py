"""The models with heads: causal language model (with MTP), sequence and token classification.

Letters: B batch, T tokens, D hidden, V vocabulary, k MTP depth from 1.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.import_utils import is_torchdynamo_compiling

from ..configuration.configuration_deepseek_v3 import DeepseekV3Config
from ..generation import LatentGenerationMixin
from .attention import Spans
from .checkpoint import without_mtp
from .losses import IGNORE_INDEX, check_labels, cross_entropy_sum, shifted
from .meter import LossMeter
from .model import DeepseekV3Model, DeepseekV3PreTrainedModel
from .mtp import mtp_hidden_states, mtp_loss, run_depth
from .outputs import DeepseekV3CausalLMOutput, DeepseekV3ModelOutput


class DeepseekV3ForCausalLM(DeepseekV3PreTrainedModel, LatentGenerationMixin):
    """The language model; with `labels` it learns the next token, the MTP depths and the experts' balance."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config)
        self.model = DeepseekV3Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_meter = LossMeter()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_mtp_logits: bool = False,
        output_mtp_state: bool = False,
        **kwargs: Any,
    ) -> DeepseekV3CausalLMOutput:
        """Predict, and learn where `labels` are given.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache: as of the base model.
            labels: [B, T], label i standing for token i; -100 is not learnt.
            logits_to_keep: logits of the last so many tokens only (0 for all), or of these positions.
            output_mtp_logits: return `mtp_logits`, depth k of shape [B, T - k, V]; row i predicts token i + k + 1.
            output_mtp_state: return `mtp_state`, which `draft` goes on from.
            kwargs: `output_hidden_states`, `output_attentions`, `output_router_logits`, `num_items_in_batch` (what
                the losses' sums are divided by, from Trainer), `shift_labels` ([B, T], already moved by one),
                `token_mask` (as of the base model).

        Raises:
            ValueError: as of the base model; labels out of vocabulary or of another shape; MTP logits asked of a
                model without MTP modules, or in the middle of a cached sequence.
        """
        num_items, shift_labels = kwargs.pop("num_items_in_batch", None), kwargs.pop("shift_labels", None)
        learns = labels is not None or shift_labels is not None
        if inputs_embeds is None and self._runs_mtp(learns, output_mtp_logits):
            inputs_embeds, input_ids = self.model._embed(input_ids, None), None  # type: ignore[assignment]
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        outputs: DeepseekV3ModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            router_statistics=learns and self.config.seq_balance_loss_alpha > 0,
            **kwargs,
        )
        hidden_states: Any = outputs.last_hidden_state
        logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        states = None
        if self._runs_mtp(learns, output_mtp_logits):
            masks = (attention_mask, kwargs.get("token_mask"))
            states = self._mtp_states(outputs, inputs_embeds, masks, position_ids, seen, output_mtp_logits)
        losses = {}
        if learns:
            own = (labels, shift_labels)
            losses = self._losses(logits, outputs.balance_loss, states, own, num_items, position_ids)
        return DeepseekV3CausalLMOutput(
            **losses,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            mtp_logits=tuple(self.lm_head(state) for state in states or ()) if output_mtp_logits else None,
            mtp_state=self._mtp_input(outputs) if output_mtp_state else None,
        )

    def draft(
        self,
        module: int,
        previous: torch.Tensor,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        past_key_values: Cache | None = None,
        mla_form: str | None = None,
        mla_spans: Spans | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one MTP module on cached or fresh rows.

        Args:
            module: which one, from 0.
            previous: [B, T, D], `mtp_state` or what the previous module gave as its second result.
            inputs_embeds: [B, T, D], embeddings of the tokens that the rows look at.
            attention_mask, position_ids, past_key_values, mla_form, mla_spans: as of the base model.

        Returns:
            What `lm_head` reads, [B, T, D], and what the next module (or this one again) takes as `previous`.
        """
        layer = self.model.mtp_layers[module]
        kwargs = {"past_key_values": past_key_values, "mla_form": mla_form, "mla_spans": mla_spans}
        states = run_depth(self.model, layer, previous, inputs_embeds, attention_mask, position_ids, **kwargs)
        residual, normed = states
        return normed, residual if self.config.mtp_hidden_state == "pre_norm" else normed

    def _mtp_input(self, outputs: DeepseekV3ModelOutput) -> Any:
        pre_norm = self.config.mtp_hidden_state == "pre_norm" and outputs.pre_norm_hidden_state is not None
        return outputs.pre_norm_hidden_state if pre_norm else outputs.last_hidden_state

    def _runs_mtp(self, learns: bool, output_mtp_logits: bool) -> bool:
        if output_mtp_logits and not self.model.mtp_layers:
            raise ValueError(
                "output_mtp_logits: the model has no MTP module (config.num_nextn_predict_layers = 0). Load a "
                "checkpoint that holds one, or build the model with num_nextn_predict_layers >= 1"
            )
        return output_mtp_logits or (learns and bool(self.model.mtp_layers) and self.config.mtp_loss_weight > 0)

    def _mtp_states(
        self,
        outputs: DeepseekV3ModelOutput,
        inputs_embeds: Any,
        masks: tuple[torch.Tensor | None, torch.Tensor | None],
        position_ids: torch.Tensor | None,
        seen: Any,
        asked: bool,
    ) -> list[torch.Tensor] | None:
        if isinstance(seen, int) and seen > 0:
            if asked:
                raise ValueError("output_mtp_logits needs the whole sequence in one forward; pass no filled cache")
            return None
        return mtp_hidden_states(self.model, self._mtp_input(outputs), inputs_embeds, *masks, position_ids)

    def _losses(
        self,
        logits: torch.Tensor,
        balance: torch.Tensor | None,
        states: list[torch.Tensor] | None,
        given: tuple[torch.Tensor | None, torch.Tensor | None],
        num_items: torch.Tensor | int | None,
        position_ids: torch.Tensor | None,
    ) -> dict[str, Any]:
        """The output's losses by name. Sums are divided by `num_items`, or by the main loss's own number of terms.

        `given` is labels that stand for their own token, or else labels already moved by one.
        """
        vocabulary = logits.shape[-1]
        labels, targets = _checked_labels(logits, *given)
        own_terms = (targets != IGNORE_INDEX).sum().clamp(min=1)
        terms = num_items if num_items is not None else own_terms
        terms = terms.to(logits.device) if isinstance(terms, torch.Tensor) else terms
        main = cross_entropy_sum(logits.reshape(-1, vocabulary), targets.reshape(-1)) / terms
        losses = {"loss": main, "main_loss": main}
        if states:
            depths = len(self.model.mtp_layers)
            losses["mtp_loss"] = mtp_loss(states, self.lm_head, labels, position_ids, depths, terms, vocabulary)
            losses["loss"] = losses["loss"] + self.config.mtp_loss_weight * losses["mtp_loss"]
        if balance is not None and self.config.seq_balance_loss_alpha > 0:
            # A forward's share by its tokens, as of the other losses: accumulated forwards add up to their mean.
            losses["balance_loss"] = losses["aux_loss"] = balance.to(logits.device) * (own_terms / terms)
            losses["loss"] = losses["loss"] + losses["balance_loss"]
        if self.training and not is_torchdynamo_compiling():
            self.loss_meter.add(losses, summed=num_items is not None)
        return losses


def _checked_labels(
    logits: torch.Tensor, labels: torch.Tensor | None, moved: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels [B, T] standing for their own token and the same moved by one, from whichever was given."""
    # Labels that come moved replace the others, as in transformers: a shard of a sequence cannot move its own.
    given = labels if moved is None else moved
    assert given is not None
    if given.shape != logits.shape[:2]:
        raise ValueError(
            f"labels have shape {tuple(given.shape)} and the logits {tuple(logits.shape[:2])}; "
            "labels go with the whole input, without logits_to_keep"
        )
    if not is_torchdynamo_compiling():
        check_labels(given, logits.shape[-1])
    given = given.to(logits.device)
    if moved is None:
        return given, shifted(given, 1)
    return torch.nn.functional.pad(given, (1, 0), value=IGNORE_INDEX)[:, :-1], given


class DeepseekV3ForSequenceClassification(GenericForSequenceClassification, DeepseekV3PreTrainedModel):
    """A score a sequence, from its last token that is no padding. MTP modules are left out: nothing would use them."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(without_mtp(config))


class DeepseekV3ForTokenClassification(GenericForTokenClassification, DeepseekV3PreTrainedModel):
    """A score a token. MTP modules are left out: nothing would use them."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(without_mtp(config))
