"""Frozen statistics and parameter groups."""

import copy
import io

import nets
import pytest
import torch
from torch import nn

import retrofit


def converted():
    return retrofit.add_batchnorm(
        nets.build(nets.Residual), [nets.images(16, 3, 16, 16)], progress=False
    )


def statistics(model):
    return {
        name: value.clone()
        for name, value in model.named_buffers()
        if "running" in name or "tracked" in name
    }


def assert_frozen(model, *, frozen):
    before = statistics(model)
    model(nets.images(4, 3, 16, 16, seed=9))
    same = [torch.equal(before[name], value) for name, value in statistics(model).items()]
    assert all(same) if frozen else not any(same)


def test_frozen_statistics_stay_through_a_parents_train():
    model = converted()
    parent = nn.Sequential(model, nn.Dropout())
    retrofit.freeze_statistics(model)
    parent.train()
    assert model.training
    assert_frozen(model, frozen=True)
    parent.eval().train()
    assert_frozen(model, frozen=True)
    model(nets.images(4, 3, 16, 16)).sum().backward()
    assert model.stem.bn.weight.grad is not None


def test_in_train_mode_a_frozen_network_computes_what_the_original_does():
    model = converted().train()
    retrofit.freeze_statistics(model)
    x = nets.images(4, 3, 16, 16, seed=9)
    assert torch.equal(model(x), nets.build(nets.Residual)(x))


def test_unfreezing_follows_the_mode_of_the_model_again():
    model = converted()
    retrofit.freeze_statistics(model)
    model.train()
    retrofit.unfreeze_statistics(model)
    assert_frozen(model, frozen=False)
    model.eval()
    assert_frozen(model, frozen=True)
    assert "train" not in vars(model.stem.bn)


def test_copies_and_pickles_stay_frozen_on_their_own():
    model = converted()
    retrofit.freeze_statistics(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        other.train()
        assert_frozen(other, frozen=True)
        retrofit.unfreeze_statistics(other)
        assert_frozen(other, frozen=False)
    model.train()
    assert_frozen(model, frozen=True)


def test_param_groups_keep_decay_from_batchnorm_and_biases():
    model = converted()
    model.head.weight.requires_grad_(False)
    decayed, free = retrofit.param_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0.0
    assert [names[id(p)] for p in decayed["params"]] == [
        "stem.conv.weight",
        "body.0.conv.weight",
        "body.2.conv.weight",
    ]
    assert len(free["params"]) == 3 + 6 + 1
    optimizer = torch.optim.SGD(retrofit.param_groups(model, 0.1), lr=0.1)
    gamma = model.stem.bn.weight.clone()
    (model(nets.images(2, 3, 16, 16)).sum() * 0).backward()
    optimizer.step()
    assert torch.equal(model.stem.bn.weight, gamma)


@pytest.mark.parametrize("batch", [2, 8])
def test_a_training_step_lowers_the_loss(batch):
    model = converted().train()
    x, y = nets.images(batch, 3, 16, 16), torch.arange(batch) % 5
    optimizer = torch.optim.SGD(retrofit.param_groups(model), lr=0.05)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def decayed_names(model):
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = retrofit.param_groups(model)
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    return {names[id(p)] for p in decayed["params"]}


class WithTables(nn.Module):
    """Biases of other names and shapes, a layer scale, and a norm of its own."""

    def __init__(self):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.q_bias = nn.Parameter(torch.zeros(1, 4))
        self.gamma, self.temperature = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(()))
        self.weight = nn.Parameter(torch.ones(4, 4))


@pytest.mark.parametrize(
    ("model", "decayed"),
    [
        (
            nn.MultiheadAttention(8, 2, add_bias_kv=True),
            {"in_proj_weight", "out_proj.weight"},
        ),
        (nn.LSTM(3, 4), {"weight_ih_l0", "weight_hh_l0"}),
        (nn.Sequential(nn.LayerNorm([4, 2]), nn.GroupNorm(2, 4), nn.RMSNorm([3, 2])), set()),
        (nn.Sequential(nn.Bilinear(2, 3, 4), nn.PReLU(4), nn.InstanceNorm2d(4, affine=True)),
         {"0.weight"}),
        (WithTables(), {"weight"}),
    ],
    ids=["attention", "LSTM", "norms", "bilinear", "tables"],
)  # fmt: skip
def test_no_bias_norm_or_vector_decays(model, decayed):
    assert decayed_names(model) == decayed


def test_where_only_batchnorms_learn_the_first_group_is_empty_and_an_optimizer_takes_it():
    model = converted().requires_grad_(False)
    model.stem.bn.requires_grad_(True)
    decayed, free = retrofit.param_groups(model)
    assert decayed["params"] == []
    assert len(free["params"]) == 2
    torch.optim.AdamW([decayed, free], lr=0.1).step()


def test_that_there_is_nothing_to_freeze_is_said():
    with pytest.warns(UserWarning, match="this Residual has no BatchNorm: nothing is frozen"):
        retrofit.freeze_statistics(nets.build(nets.Residual))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Linear(2, 2).requires_grad_(False), {}, "no parameter of this Linear requires a gradi"),
        (nn.ReLU(), {}, "no parameter of this ReLU requires a gradient"),
        (nn.LazyLinear(2), {}, "weight is lazy and has no shape yet: run one batch first"),
        (nn.Linear(2, 2), {"weight_decay": "5e-4"}, "from 0 up, not '5e-4'"),
        (nn.Linear(2, 2), {"weight_decay": -1}, "weight_decay must be a number from 0 up, not -1"),
        ([nn.Linear(2, 2)], {}, "param_groups takes an nn.Module, not a list"),
    ],
)
def test_groups_that_no_optimizer_could_use_are_refused(model, options, message):
    with pytest.raises(retrofit.RetrofitError, match=message):
        retrofit.param_groups(model, **options)
