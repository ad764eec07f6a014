"""The bias update by hand, over micro-batches and over ranks."""

import pytest
import torch
from children import run_ranks

from deepseek_v3 import RouterBalanceCallback
from deepseek_v3.training import update_router_bias
from deepseek_v3.training.balance import routers_of
from twins import make_model


def test_bias_moves_by_gamma_towards_the_mean():
    model = make_model()
    router = routers_of(model)[0]
    router.e_score_correction_bias.zero_()
    router.count(torch.tensor([5.0, 0, 1, 2, 3, 2, 2, 1]))
    router.count(torch.tensor([5.0, 0, 1, 2, 3, 2, 2, 1]))
    loads = update_router_bias(model, 0.01)
    expected = torch.tensor([-0.01, 0.01, 0.01, 0.0, -0.01, 0.0, 0.0, 0.01])
    torch.testing.assert_close(router.e_score_correction_bias, expected)
    assert loads[0].tolist() == [10, 0, 2, 4, 6, 4, 4, 2]
    assert not loads[1].any()  # saw no token, and is left alone
    assert router.expert_load is None
    update_router_bias(model, 0.01)
    torch.testing.assert_close(router.e_score_correction_bias, expected)


def test_a_rate_of_zero_only_counts():
    model = make_model()
    router = routers_of(model)[0]
    before = router.e_score_correction_bias.clone()
    router.count(torch.arange(8.0))
    assert update_router_bias(model, 0.0)[0].sum() == 28
    assert torch.equal(router.e_score_correction_bias, before)


def _rank(folder):
    torch.distributed.init_process_group("gloo")
    rank, model = torch.distributed.get_rank(), make_model()
    router = routers_of(model)[0]
    router.e_score_correction_bias.zero_()
    if rank == 0:  # rank 1 saw no token
        router.count(torch.tensor([4.0, 0, 0, 0, 0, 0, 0, 0]))
    routers_of(model)[1].count(torch.tensor([3.0, 1, 2, 2, 2, 2, 2, 2]) if rank else torch.tensor([0.0] * 7 + [4]))
    update_router_bias(model, 0.5)
    torch.save([r.e_score_correction_bias for r in routers_of(model)[:2]], folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_load_is_summed_over_ranks(tmp_path):
    run_ranks(_rank, tmp_path, folder=tmp_path)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert one[0].tolist() == [-0.5] + [0.5] * 7
    start = routers_of(make_model())[1].e_score_correction_bias
    moved = torch.sign(torch.tensor([2.5 - load for load in (3, 1, 2, 2, 2, 2, 2, 6)])) * 0.5
    torch.testing.assert_close(one[1] - start, moved)


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="update_rate = -1"):
        RouterBalanceCallback(-1)
    with pytest.raises(ValueError, match="Linear has no DeepseekV3TopkRouter"):
        RouterBalanceCallback().on_train_begin(None, None, None, model=torch.nn.Linear(2, 2))
