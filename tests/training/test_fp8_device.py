"""FP8 training on a GPU: what no CPU can show. Imports no Trainer, whose own requirements a GPU may lack."""

import pytest
import torch

from deepseek_v3.training import AdamWBF16, enable_fp8_training
from twins import make_model

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "q_lora_rank": 64}
SHAPE |= {"kv_lora_rank": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_never_waits_for_the_device(dtype):
    """Forward, backward and update of a model with experts and a module, float32 weights under autocast or all in
    bfloat16; launches are compiled by a step before."""
    model = enable_fp8_training(make_model(**SHAPE).to("cuda", dtype).train())
    optimizer = AdamWBF16(model.parameters(), lr=1e-4)
    batch = torch.randint(3, 512, (2, 160), generator=torch.Generator().manual_seed(7)).cuda()

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.float32):
            loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [step(), step()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()
