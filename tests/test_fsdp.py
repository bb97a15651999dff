"""Training on several processes: `fully_shard`, HSDP, tensor parallel and DDP give the gradients of one process."""

import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import mesh_of, ranks
from samples import draw, first_quick
from torch import nn

from fused_reg import Regularizer, accumulate_grad_, fused_penalty

WORLDS = first_quick(4, 3, 2)
X = draw((12, 7))


class Net(nn.Module):
    """Uneven shapes; ``one``: a parameter whose first dimension is 1, which one process holds."""

    def __init__(self, one: bool, hidden: int = 5) -> None:
        super().__init__()
        self.a = nn.Linear(7, hidden)
        self.b = nn.Linear(hidden, 6)
        self.c = nn.Linear(6, 1 if one else 3)
        self.scale = nn.Parameter(torch.empty(1 if one else 2, 7))
        for i, p in enumerate(self.parameters()):
            p.data.copy_(draw(p.shape, seed=i))

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x * self.scale.sum(0))))))


def loss_of(net, x) -> torch.Tensor:
    return net(x).float().square().mean()


def own_rows() -> torch.Tensor:
    return X.chunk(dist.get_world_size())[dist.get_rank()]


def sharded(net, mesh=None, reshard=None, policy=None) -> nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options = {"mesh": mesh, "mp_policy": policy or MixedPrecisionPolicy()}
    fully_shard(net.a, **options)
    fully_shard(net.b, **options)
    return fully_shard(net, reshard_after_forward=reshard, **options)


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def assert_near(net, expected, atol=1e-6, grads=True) -> None:
    if hasattr(net, "reshard"):
        net.reshard()
    for (name, p), q in zip(net.named_parameters(), expected.parameters(), strict=True):
        got, wanted = (whole(p.grad), q.grad) if grads else (whole(p.detach()), q.detach())
        assert torch.allclose(got, wanted, atol=atol, rtol=1e-5), name


def expected_of(one: bool) -> tuple[nn.Module, torch.Tensor]:
    """One process, with all rows."""
    net = Net(one)
    penalty = fused_penalty(net.parameters(), l1=0.1, l2=0.2)
    (loss_of(net, X) + penalty).backward()
    return net, penalty.detach()


def penalty(source) -> torch.Tensor:
    """Of a list that is held, or of what a module has now."""
    return fused_penalty(source if isinstance(source, list) else source.parameters(), l1=0.1, l2=0.2)


def taken_before(net, x, source):
    value = penalty(source)
    (loss_of(net, x) + value).backward()
    return value


def taken_after(net, x, source):
    loss = loss_of(net, x)
    value = penalty(source)
    (loss + value).backward()
    return value


def backward_of_its_own_before(net, x, source):
    loss = loss_of(net, x)
    value = penalty(source)
    value.backward()
    loss.backward()
    return value


def backward_of_its_own_after(net, x, source):
    loss_of(net, x).backward()
    value = penalty(source)
    value.backward()
    return value


ARRANGEMENTS = (taken_before, taken_after, backward_of_its_own_before, backward_of_its_own_after)


def check_arrangement(arrangement) -> None:
    for one, reshard, held in itertools.product((False, True), (None, True, False), (False, True)):
        expected, value = expected_of(one)
        net = sharded(Net(one), reshard=reshard)
        source = list(net.parameters()) if held else net
        got = arrangement(net, own_rows(), source)
        assert torch.equal(got, value), (one, reshard, held)
        assert_near(net, expected)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_fully_shard(arrangement, world):
    """With the root resharded after the forward and not, with parameters asked for now and held since the beginning."""
    ranks(world).run(check_arrangement, arrangement)


def check_freed() -> None:
    """What was gathered when the penalty was taken, and is freed before its backward, reaches no shard."""
    net = sharded(Net(True), reshard=False)
    for l2_norm in (None, 0.1):
        loss = loss_of(net, own_rows())
        penalty = fused_penalty(net.parameters(), l1=0.1, l2_norm=l2_norm)
        loss.backward()
        with pytest.raises(RuntimeError, match="memory was freed between forward and backward, as fully_shard does"):
            penalty.backward()


@pytest.mark.parametrize("world", WORLDS)
def test_backward_after_the_parameters_are_freed(world):
    ranks(world).run(check_freed)


def train(net, x, penalize, steps=3, micro_batches=1, **options):
    """Steps of SGD with a regularizer, and its values."""
    regularizer = Regularizer(net, l1=lambda step: 0.1 / (1 + step), l2=0.2, l2_norm=0.05)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, **options)
    attachment = regularizer.attach(optimizer, penalize) if penalize in ("grad", "prox") else None
    values = []
    for _ in range(steps):
        for i, batch in enumerate(x.chunk(micro_batches)):
            loss = loss_of(net, batch) / micro_batches
            if penalize == "composed" and i == micro_batches - 1:
                loss = loss + regularizer()
            loss.backward()
        if penalize == "accumulate":
            values.append(regularizer.accumulate_grad_())
        optimizer.step()
        if attachment is None:
            regularizer.advance()
        else:
            values.append(attachment.value)
        optimizer.zero_grad()
    return torch.stack([*values, regularizer().detach()])


def check_training(make) -> None:
    for penalize in ("composed", "accumulate", "grad", "prox"):
        expected, net = Net(True), make(Net(True))
        values = train(net, own_rows(), penalize)
        wanted = train(expected, X, penalize)
        assert torch.allclose(values, wanted, rtol=1e-5), penalize
        assert_near(net, expected, atol=1e-5, grads=False)


def hybrid(net):

    return sharded(net, mesh_of((2, 2), ("replicate", "shard")))


@pytest.mark.parametrize("world", WORLDS)
def test_training_with_fully_shard(world):
    ranks(world).run(check_training, sharded)


def test_training_with_hsdp():
    ranks(4).run(check_training, hybrid)


def tensor_parallel(net, mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(net, mesh, {"a": ColwiseParallel(), "b": RowwiseParallel()})


def check_tensor_parallel(shards: int) -> None:
    """One mesh dimension for tensor parallel, the other for fully_shard; some parameters stay plain tensors."""

    world = dist.get_world_size()
    mesh = mesh_of((shards, world // shards), ("dp", "tp"))
    for penalize in ("composed", "accumulate", "grad", "prox"):
        expected, net = Net(True, 12), tensor_parallel(Net(True, 12), mesh["tp"])
        x = X
        if shards > 1:
            sharded(net, mesh["dp"])
            x = X.chunk(shards)[mesh.get_local_rank("dp")]
        values = train(net, x, penalize)
        assert torch.allclose(values, train(expected, X, penalize), rtol=1e-5), penalize
        assert_near(net, expected, atol=1e-5, grads=False)


@pytest.mark.parametrize("world_and_shards", first_quick((4, 2), (4, 1), (3, 1), (2, 1)))
def test_training_with_tensor_parallel(world_and_shards):
    world, shards = world_and_shards
    ranks(world).run(check_tensor_parallel, shards)


def check_parameters_replaced() -> None:
    """By tensor parallel, by fully_shard, and by fully_shard after tensor parallel: these are followed. What the root
    shows as gathered for a while is not."""

    calls = (
        lambda r: r(),
        lambda r: r.accumulate_grad_(),
        lambda r: r.prox_(0.1),
        lambda r: r.report(),
    )
    for call in calls:
        mesh = mesh_of((dist.get_world_size(), 1), ("dp", "tp"))
        net = Net(True, 12)
        before, between = Regularizer(net, l1=0.1), Regularizer(tensor_parallel(net, mesh["tp"]), l1=0.1)
        sharded(net, mesh["dp"])
        after = Regularizer(net, l1=0.1)
        for stale in (before, between):
            with pytest.warns(UserWarning, match="^Regularizer: it follows its module: .* replaced; an optimizer"):
                call(stale)
            assert_same_params(stale, after)
        loss = loss_of(net, own_rows())  # the root shows what it has gathered
        for regularizer in (before, between, after):
            call(regularizer)
            assert_same_params(regularizer, after)
        loss.backward()
        call(Regularizer(net, l1=0.1))


def assert_same_params(regularizer: Regularizer, other: Regularizer) -> None:
    pairs = zip(regularizer.named_parameters(), other.named_parameters(), strict=True)
    assert all(name == name_too and p is q for (name, p), (name_too, q) in pairs)


def test_parameters_replaced_behind_a_regularizer():
    ranks(2).run(check_parameters_replaced)


def check_accumulation() -> None:
    """The penalty once for each step, whatever the micro-batches; the gradients reduced each time, or once."""
    for penalize in ("composed", "accumulate", "grad"):
        expected, net = Net(True), sharded(Net(True))
        train(net, own_rows(), penalize, micro_batches=len(own_rows()))
        train(expected, X, penalize)
        assert_near(net, expected, atol=1e-5, grads=False)
    expected, net = Net(True), sharded(Net(True))
    (loss_of(expected, X) + fused_penalty(expected.parameters(), 0.1)).backward()
    net.set_requires_gradient_sync(False)
    (loss_of(net, own_rows()[:1]) / len(own_rows())).backward()
    net.set_requires_gradient_sync(True)
    rest = own_rows()[1:]
    (loss_of(net, rest) * len(rest) / len(own_rows()) + fused_penalty(net.parameters(), 0.1)).backward()
    assert_near(net, expected)


@pytest.mark.parametrize("world", WORLDS)
def test_gradient_accumulation(world):
    ranks(world).run(check_accumulation)


def check_mixed_precision() -> None:
    """The sharded parameters are float32, and so is the penalty's gradient there."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    plain, penalized, added = sharded(Net(True), policy=policy), sharded(Net(True), policy=policy), Net(True)
    loss_of(plain, own_rows()).backward()
    regularizer = Regularizer(penalized, l1=0.1, l2=0.2)
    (loss_of(penalized, own_rows()) + regularizer()).backward()
    fused_penalty(added.parameters(), l1=0.1, l2=0.2).backward()
    for without, p, q in zip(plain.parameters(), penalized.parameters(), added.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        assert torch.allclose(whole(p.grad), whole(without.grad) + q.grad, atol=1e-6)


@pytest.mark.parametrize("world", WORLDS)
def test_mixed_precision(world):
    ranks(world).run(check_mixed_precision)


def check_checkpoint(folder) -> None:
    """Two steps, saved, loaded into a new model, and two more: as four."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def start(seed: int):
        net = Net(True)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(seed)
        net = sharded(net)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0)
        regularizer = Regularizer(net, l1=lambda step: 0.1 / (1 + step), l2=0.2)
        regularizer.attach(optimizer)
        return net, optimizer, regularizer

    def steps(net, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            loss_of(net, own_rows()).backward()
            optimizer.step()

    through, optimizer, _ = start(0)
    steps(through, optimizer, 4)
    net, optimizer, regularizer = start(0)
    steps(net, optimizer, 2)
    model_state, optimizer_state = get_state_dict(net, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "regularizer": regularizer.state_dict()}
    checkpoint.save(state, checkpoint_id=folder)

    net, optimizer, regularizer = start(1)
    model_state, optimizer_state = get_state_dict(net, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "regularizer": regularizer.state_dict()}
    checkpoint.load(state, checkpoint_id=folder)
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    regularizer.load_state_dict(state["regularizer"])
    assert regularizer.step == 2
    steps(net, optimizer, 2)
    for p, q in zip(net.parameters(), through.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local())


@pytest.mark.parametrize("world", WORLDS)
def test_distributed_checkpoint(world, tmp_path):
    ranks(world).run(check_checkpoint, str(tmp_path))


DDP_OPTIONS = ({}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}, {"static_graph": True})


def check_ddp(options) -> None:
    from torch.nn.parallel import DistributedDataParallel

    for use in ("composed", "accumulate_grad_"):
        expected, value = expected_of(True)
        net = DistributedDataParallel(Net(True), **options)
        for _ in range(2):  # a static graph is learned in the first step
            net.zero_grad()
            loss = loss_of(net, own_rows())
            if use == "composed":
                got = fused_penalty(net.parameters(), l1=0.1, l2=0.2)
                (loss + got).backward()
            else:
                loss.backward()
                got = accumulate_grad_(net.parameters(), l1=0.1, l2=0.2)
            assert torch.equal(got.detach(), value)
            assert_near(net.module, expected)


def check_ddp_with_an_unused_layer() -> None:
    from torch.nn.parallel import DistributedDataParallel

    for find, raises in ((False, False), (True, True)):
        net = DistributedDataParallel(Net(True), find_unused_parameters=find)
        net.module.unused = net.module.c
        net.module.c = nn.Identity()
        expected = 0.2 * 2 * net.module.unused.weight.detach()
        loss = loss_of(net, own_rows()) + fused_penalty(net.parameters(), l2=0.2)
        if raises:
            with pytest.raises(RuntimeError, match="ready only once"):
                loss.backward()
        else:
            loss.backward()
            assert torch.allclose(net.module.unused.weight.grad, expected)


def test_ddp_with_an_unused_layer():
    """In the loss the penalty uses it: what docs/distributed.md says of `find_unused_parameters`."""
    ranks(2).run(check_ddp_with_an_unused_layer)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("options", DDP_OPTIONS, ids=lambda options: next(iter(options), "plain"))
def test_ddp(options, world):
    ranks(world).run(check_ddp, options)
