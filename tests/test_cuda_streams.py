"""Graphs that are captured and replayed, and streams that run at once (hard case 35)."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import assert_same_bits
from samples import draw, draw_list, leaves, many, mixed_list, one_each

from fused_reg import fused_penalty, value_and_grad

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.usefixtures("cuda"),
    # Of a node that the engine's thread has not let go of yet, when the next call runs on another stream.
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match"),
]

BOTH = {"l1": 0.1, "l2": 1 / 3}


def captured(function):
    """A graph of what a call launches, and the tensors that each replay writes again."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def assert_replays(function, change, replays=1000, every=50) -> None:
    """Each replay computes from what the weights and strengths are then: the bits of a call at that time."""
    graph, results = captured(function)
    graph.replay()
    first = results[0].clone()
    for replay in range(replays):
        change()
        graph.replay()
        if replay % every == 0:
            assert_same_bits(results, function())
    assert_same_bits(results, function())
    assert not torch.equal(results[0], first)


def shrink(*tensors):
    """In place, by a bit more than a rounding."""

    def change():
        with torch.no_grad():
            for t in tensors:
                t.mul_(0.996)

    return change


def of_autograd(params, upstream=None, **strengths):
    """A function that returns the value and the gradients, by a forward and a backward."""
    wanted = [p for p in params if p.requires_grad]

    def function():
        penalty = fused_penalty(params, **strengths)
        return [penalty.detach(), *torch.autograd.grad(penalty, wanted, upstream)]

    return function


def strengths_on(device, count):
    return {
        "floats": {"l1": 0.1, "l2": one_each(count)},
        "one on the device": {"l1": torch.tensor(0.5, device=device), "l2": 0.3},
        "one each on the device": {
            "l1": torch.tensor(one_each(count), device=device),
            "l2": torch.tensor(0.7, dtype=torch.float64, device=device),
        },
    }


STRENGTHS = pytest.mark.parametrize("strengths", ["floats", "one on the device", "one each on the device"])


def device_tensors(params, strengths):
    return [*(p.detach() for p in params), *(s for s in strengths.values() if isinstance(s, torch.Tensor))]


@STRENGTHS
def test_forward_in_a_graph(strengths, cuda):
    params = mixed_list(cuda)
    strengths = strengths_on(cuda, len(params))[strengths]
    change = shrink(*device_tensors(params, strengths))
    assert_replays(lambda: [fused_penalty(params, **strengths)], change)
    assert_replays(lambda: [(r := value_and_grad(params, **strengths))[0], *r[1]], change, replays=200)


@STRENGTHS
@pytest.mark.parametrize("upstream", [None, 1.0, 0.37])
def test_forward_and_backward_in_a_graph(upstream, strengths, cuda):
    """With frozen parameters, and an upstream gradient that is 1 unsaid, is 1, and changes."""
    params = [p.detach().requires_grad_(i % 4 > 0) for i, p in enumerate(mixed_list(cuda))]
    strengths = strengths_on(cuda, len(params))[strengths]
    tensors = device_tensors(params, strengths)
    if upstream is not None:
        upstream = torch.tensor(upstream, dtype=torch.float64, device=cuda)
        tensors += [upstream] if upstream.item() != 1 else []
    assert_replays(of_autograd(params, upstream, **strengths), shrink(*tensors))


@pytest.mark.parametrize("both", [True, False])
def test_trained_strengths_in_a_graph(both, cuda):
    """Their gradients too; beside floats of every parameter, which no replay reads from the host."""
    params = leaves(draw_list(torch.float32, cuda))
    l1 = torch.tensor(0.5, dtype=torch.float64, device=cuda, requires_grad=True)
    l2 = torch.tensor(one_each(len(params)), device=cuda, requires_grad=True) if both else one_each(len(params))
    trained = [l1, l2] if both else [l1]

    def function():
        penalty = fused_penalty(params, l1=l1, l2=l2)
        return [penalty.detach(), *torch.autograd.grad(penalty, [*trained, *params])]

    assert_replays(function, shrink(*(t.detach() for t in [*params, *trained])), replays=200)


def test_accumulated_gradients_in_a_graph(cuda):
    """`.grad`, as a training step fills it."""
    weights = draw_list(torch.float32, cuda)
    params = leaves(weights)

    def step():
        for p in params:
            p.grad = None
        fused_penalty(params, **BOTH).backward()
        return [p.grad for p in params]

    graph, grads = captured(step)
    for _ in range(100):
        shrink(*weights)()
        graph.replay()
    assert_same_bits(grads, value_and_grad(weights, **BOTH)[1])


def test_long_table_in_a_graph(cuda):
    """5,000 tensors, whose table is too long for the arguments of a kernel."""
    weights = many(5000, cuda)
    strength = torch.tensor(one_each(5000), device=cuda)
    change = shrink(*weights[:50], strength)
    assert_replays(lambda: [fused_penalty(weights, l1=strength, l2=0.3)], change, replays=1000, every=250)
    function = of_autograd(leaves(weights), torch.tensor(0.37, device=cuda), l1=strength, l2=0.3)
    assert_replays(function, change, replays=100, every=50)


def test_calls_between_replays(cuda):
    """Of the same list and of others, on the stream of the replays: each finds its own table and ticket."""
    short, long = mixed_list(cuda), many(2000, cuda)
    graph, results = captured(lambda: [fused_penalty(short, **BOTH), fused_penalty(long, **BOTH)])
    expected = [fused_penalty(short, **BOTH), fused_penalty(long, **BOTH)]
    for i in range(20):
        graph.replay()
        value_and_grad(long, l1=0.1 * i)
        graph.replay()
        assert_same_bits([fused_penalty(short, **BOTH), fused_penalty(long, **BOTH)], expected)
        assert_same_bits(results, expected)


def test_captures_without_end(cuda):
    """70,000 calls in graphs that end: their counters come back."""
    params = [draw(300, device=cuda)]
    expected = fused_penalty(params, **BOTH)
    for _ in range(70):
        graph, results = captured(lambda: [fused_penalty(params, **BOTH) for _ in range(1000)])
    graph.replay()
    assert_same_bits([torch.stack(results)], [expected.expand(1000)])


def test_memory_pools_that_end(cuda):
    """Long tables and sums of a call in a pool of its own: no memory of it is kept."""
    lists = [many(2000, cuda, seed=seed) for seed in range(8)]
    expected = [value_and_grad(params, **BOTH)[0] for params in lists]
    for _ in range(2):
        for params, value in zip(lists, expected, strict=True):
            pool = torch.cuda.MemPool()
            with torch.cuda.use_mem_pool(pool):
                own = value_and_grad(params, **BOTH)[0].item()
            del pool
            torch.cuda.empty_cache()
            assert own == value.item()


@pytest.mark.parametrize("count", [11, 1400])
def test_graphs_of_a_compiler(count, cuda):
    """`reduce-overhead` captures after runs in a pool of its own, and looks for what these have left there."""
    params = leaves(many(count, cuda))
    expected = gradients_of(params)
    compiled = torch.compile(lambda: fused_penalty(params, **BOTH), mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        penalty = compiled()
        assert_same_bits(torch.autograd.grad(penalty, params), expected)


def gradients_of(params):
    return torch.autograd.grad(fused_penalty(params, **BOTH), params)


def large(seed, device):
    """Enough for the whole device, so that launches on several streams share it."""
    return [draw(3_000_000 + 77 * seed, device=device, seed=seed), *many(300 + seed, device, seed)]


def test_two_graphs_at_once(cuda):
    """Replayed on two streams: neither sees the other's."""
    lists = [large(seed, cuda) for seed in range(2)]
    expected = [fused_penalty(params, **BOTH) for params in lists]
    graphs = [captured(lambda p=params: [(r := value_and_grad(p, **BOTH))[0], *r[1]]) for params in lists]
    streams = [torch.cuda.Stream() for _ in lists]
    values = [torch.empty(300, device=cuda) for _ in lists]
    torch.cuda.synchronize()
    for i in range(300):
        for stream, (graph, results), own in zip(streams, graphs, values, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
                own[i].copy_(results[0])
    torch.cuda.synchronize()
    for params, (_, results), own, value in zip(lists, graphs, values, expected, strict=True):
        assert_same_bits([own], [value.expand(300)])
        assert_same_bits(results[1:], value_and_grad(params, **BOTH)[1])


def test_two_streams_at_once(cuda):
    """Each with its own list; short and long tables, forward and backward."""
    lists = [[*large(seed, cuda), *many(1500 * seed, cuda, seed)] for seed in range(2)]
    upstream = torch.tensor(0.37, device=cuda)
    functions = [of_autograd(leaves(params), upstream, **BOTH) for params in lists]
    expected = [function() for function in functions]
    streams = [torch.cuda.Stream() for _ in lists]
    values, last = [[], []], [None, None]
    torch.cuda.synchronize()
    for i in range(200):
        for which, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if i % 20 == 0:
                    value, *last[which] = functions[which]()
                else:
                    value = fused_penalty(lists[which], **BOTH)
                values[which].append(value)
    torch.cuda.synchronize()
    for own, grads, (value, *expected_grads) in zip(values, last, expected, strict=True):
        assert_same_bits([torch.stack(own)], [value.expand(200)])
        assert_same_bits(grads, expected_grads)


def test_a_stream_for_each_thread(cuda):
    """And two threads on each stream."""
    lists = [[draw(200_000 + seed, device=cuda, seed=seed), *many(700 * seed, cuda, seed)] for seed in range(4)]
    expected = [value_and_grad(params, **BOTH) for params in lists]
    streams = [torch.cuda.Stream() for _ in lists]
    torch.cuda.synchronize()

    def work(i):
        with torch.cuda.stream(streams[i % 4]):
            results = [value_and_grad(lists[i % 4], **BOTH) for _ in range(20)]
            streams[i % 4].synchronize()
            return results

    with ThreadPoolExecutor(8) as pool:
        for i, results in enumerate(pool.map(work, range(8))):
            value, grads = expected[i % 4]
            assert_same_bits([torch.stack([other for other, _ in results])], [value.expand(20)])
            assert_same_bits(results[-1][1], grads)


@pytest.mark.parametrize("forward_aside", [False, True])
def test_backward_on_another_stream(forward_aside, cuda):
    """A busy one, where the upstream gradient is written late."""
    params = leaves(mixed_list(cuda))
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    forward, backward = (aside, here) if forward_aside else (here, aside)
    expected = of_autograd(params, torch.tensor(0.37, dtype=torch.float64, device=cuda), **BOTH)()
    torch.cuda.synchronize()
    with torch.cuda.stream(forward):
        torch.cuda._sleep(20_000_000)
        penalty = fused_penalty(params, **BOTH)
    backward.wait_stream(forward)
    with torch.cuda.stream(backward):
        upstream = torch.ones((), dtype=torch.float64, device=cuda)
        torch.cuda._sleep(20_000_000)
        upstream.fill_(0.37)
        grads = torch.autograd.grad(penalty, params, upstream)
    torch.cuda.synchronize()
    assert_same_bits([penalty, *grads], expected)


def test_works_on_the_current_stream(cuda):
    """What was launched on another stream before is done first, with no wait in between."""
    weights = draw_list(torch.float32, cuda)
    expected = value_and_grad([2 * w for w in weights], **BOTH)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        for w in weights:
            w.mul_(2)
        value, grads = value_and_grad(weights, **BOTH)
        torch.cuda.current_stream().synchronize()
    assert_same_bits([value, *grads], [expected[0], *expected[1]])
