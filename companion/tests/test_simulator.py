"""The simulator keeps exact time: numbers by hand, closed forms, laws that random programs keep."""

import random
from itertools import pairwise
from math import inf

import pytest
import torch

from companion.parallel.network import H100, Network
from companion.parallel.requests import Begin, Compute, Hold, Meet, Receive, Send, Wait
from companion.parallel.rings import ring_all_reduce, ring_broadcast
from companion.parallel.simulator import simulate
from companion.parallel.traffic import Link, seconds
from companion.parallel.trees import tree_all_reduce, tree_broadcast

LINK = Link(latency=0.5, bandwidth=8.0)  # one number in FP64 takes 0.5 + 1 seconds
ONE = torch.ones(1, dtype=torch.float64)
FREE = Network(Link(0.0, inf))


def run(*programs, network=None, **options):
    """Simulate one program a rank, each a function without arguments."""
    network = network or Network(LINK)
    return simulate(lambda r, n: programs[r](), len(programs), network=network, **options)


def spans(timeline, lane):
    return [(s.rank, s.label, s.start, s.end) for s in timeline.spans if s.lane == lane]


def sender(*to, after=0.0):
    def program():
        yield Compute(after)
        for rank in to:
            yield Send(rank, ONE)

    return program


def receiver(*sources):
    def program():
        for source in sources:
            yield Receive(source, ONE)

    return program


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 64])
@pytest.mark.parametrize(
    "kind, way, algorithm",
    [
        ("all_reduce", "ring", ring_all_reduce),
        ("broadcast", "ring", ring_broadcast),
        ("all_reduce", "tree", tree_all_reduce),
        ("broadcast", "tree", tree_broadcast),
    ],
)
def test_collectives_take_what_the_closed_form_says_and_are_right(ranks, kind, way, algorithm):
    network = Network(Link(latency=1e-5, bandwidth=1e9))
    base = torch.arange(192, dtype=torch.float64)  # 64 and 3 divide its length
    timeline = simulate(lambda r, n: algorithm(r, n, base * (r + 1)), ranks, network=network)
    expected = seconds(kind, base.nbytes, ranks, network.inside, way)
    assert timeline.seconds == pytest.approx(expected, rel=1e-12)
    total = base * (sum(range(ranks + 1)) if kind == "all_reduce" else 1)
    assert all(torch.equal(result, total) for result in timeline.results)
    trips = 2 if kind == "all_reduce" else 1
    assert sum(timeline.sent) == trips * (ranks - 1) * base.nbytes
    if (kind, way) == ("all_reduce", "ring"):
        direct = 2 * (ranks - 1) * (1e-5 + base.nbytes / ranks / 1e9)
        assert timeline.seconds == pytest.approx(direct, rel=1e-12)
        assert set(timeline.sent) == {2 * (ranks - 1) * base.nbytes / ranks}


def test_messages_of_one_sender_leave_one_after_the_other_and_receivers_wait():
    timeline = run(sender(1, 2, after=2.0), receiver(0), receiver(0))
    assert spans(timeline, "compute") == [(0, "", 0, 2)]
    assert spans(timeline, "link") == [(0, "send to 1", 2, 3.5), (0, "send to 2", 3.5, 5)]
    assert timeline.seconds == 5 and timeline.sent == [16, 0, 0]


def test_a_rank_takes_in_one_message_at_a_time():
    timeline = run(sender(2), sender(2), receiver(1, 0))
    assert spans(timeline, "link") == [(0, "send to 2", 0, 1.5), (1, "send to 2", 1.5, 3)]
    assert timeline.seconds == 3
    gather = simulate(lambda r, n: receiver(*range(1, n))() if r == 0 else sender(0)(), 9)
    expected = max(7 * H100.inside.seconds(8), H100.between.seconds(8))
    assert gather.seconds == pytest.approx(expected, rel=1e-12)


def test_a_rank_sends_inside_its_node_and_between_nodes_at_once():
    network = Network(LINK, between=Link(2.0, 4.0), node=2)
    timeline = run(sender(1, 2), receiver(0), receiver(0), receiver(), network=network)
    assert spans(timeline, "link") == [(0, "send to 1", 0, 1.5), (0, "send to 2", 0, 4)]
    one = Network(LINK, node=2)
    timeline = run(sender(1, 2), receiver(0), receiver(0), receiver(), network=one)
    assert timeline.seconds == 3


def test_a_receiver_has_its_own_copy_and_order_is_kept():
    first, second = torch.tensor([1.0]), torch.tensor([2.0])

    def source():
        yield Send(1, first)
        yield Send(1, second)
        first.zero_()

    def sink():
        yield Compute(10)
        a = yield Receive(0, first)
        a += 5
        return a.item(), (yield Receive(0, first)).item()

    assert run(source, sink).results == [None, (6.0, 2.0)]


def test_what_was_begun_runs_in_order_beside_the_program():
    def work(time, value):
        yield Compute(time, f"begun {value}")
        return value

    def program():
        first = yield Begin(work(3, "a"))
        second = yield Begin(work(2, "b"))
        yield Compute(4, "own")
        values = [(yield Wait(second)), (yield Wait(first))]
        yield Compute(1, "last")
        return values

    timeline = run(program)
    assert spans(timeline, "compute") == [(0, "own", 0, 4), (0, "last", 5, 6)]
    assert spans(timeline, "link") == [(0, "begun a", 0, 3), (0, "begun b", 3, 5)]
    assert timeline.results == [["b", "a"]] and timeline.seconds == 6
    assert timeline.busy(0) == 5 and timeline.busy(0, "link") == 5


def test_a_meeting_starts_with_its_last_member_and_its_key_can_be_used_again():
    def member(time):
        def program():
            for _ in range(2):
                yield Compute(time)
                yield Meet("sum", (0, 1), 1.0, sent=7.0, label="sum")

        return program

    timeline = run(member(1), member(3))
    assert spans(timeline, "link") == [(r, "sum", s, s + 1) for s in (3, 7) for r in (0, 1)]
    assert timeline.sent == [14, 14]


def test_memory_is_a_timeline_with_a_peak():
    def program():
        yield Hold(4)
        yield Compute(2)
        yield Hold(3)
        yield Compute(1)
        yield Hold(-7)

    timeline = run(program, receiver())
    assert timeline.memory == [([0, 0, 2, 3], [0, 4, 7, 0]), ([0], [0])]
    assert timeline.peak == [7, 0]


def test_slow_ranks_compute_longer_and_nothing_else_does():
    def twice():
        yield Compute(1)
        yield Compute(2)

    assert run(twice, twice, slow=[1.0, 3.0]).seconds == 9
    assert run(twice, twice, slow=lambda rank, index: 1 + rank + 10 * index).seconds == 2 + 2 * 12
    assert run(sender(1), receiver(0), slow=[9.0, 9.0]).seconds == 1.5


def random_program(seed):
    """Programs of 5 ranks that cannot deadlock: parts of one list of events, in its order."""
    draw = random.Random(seed)
    ranks, events = 5, []
    for number in range(60):
        kind = draw.choice(["compute", "message", "message", "begin", "meet"])
        if kind == "message":
            events.append((kind, *draw.sample(range(ranks), 2), draw.randint(1, 9), number))
        elif kind == "meet":
            members = tuple(sorted(draw.sample(range(ranks), draw.randint(2, ranks))))
            events.append((kind, members, draw.random(), number))
        else:
            events.append((kind, draw.randrange(ranks), draw.random()))
    return ranks, events


def play(rank, events):
    """The part of one rank; returns when it received what."""
    got, begun = [], []
    for kind, *more in events:
        if kind == "message" and more[0] == rank:
            yield Send(more[1], torch.full((more[2],), float(more[3])))
        elif kind == "message" and more[1] == rank:
            tensor = yield Receive(more[0], torch.empty(more[2]))
            got.append((more[3], tensor.tolist()))
        elif kind == "meet" and rank in more[0]:
            yield Meet(more[2], more[0], more[1])
        elif kind == "compute" and more[0] == rank:
            yield Compute(more[1])
        elif kind == "begin" and more[0] == rank:
            begun.append((yield Begin(iter_compute(more[1]))))
    for handle in begun:
        yield Wait(handle)
    return got


def iter_compute(time):
    yield Compute(time)


def earliest(ranks, events, link):
    """When the last rank is done if no message ever waits for a port: a lower bound."""
    now, lane = [0.0] * ranks, [0.0] * ranks
    for kind, *more in events:
        if kind == "compute":
            now[more[0]] += more[1]
        elif kind == "begin":
            lane[more[0]] = max(lane[more[0]], now[more[0]]) + more[1]
        elif kind == "message":
            now[more[1]] = max(now[more[1]], now[more[0]] + link.seconds(4 * more[2]))
        else:
            start = max(now[rank] for rank in more[0])
            for rank in more[0]:
                now[rank] = start + more[1]
    return max(*now, *lane)


@pytest.mark.parametrize("seed", range(12))
def test_random_programs_keep_the_laws(seed):
    ranks, events = random_program(seed)
    network = Network(Link(0.05, 100.0))
    timeline = simulate(lambda r, n: play(r, events), ranks, network=network)
    assert timeline == simulate(lambda r, n: play(r, events), ranks, network=network)
    messages = [more for kind, *more in events if kind == "message"]
    for rank in range(ranks):
        mine = [(number, [float(number)] * n) for _, to, n, number in messages if to == rank]
        assert timeline.results[rank] == mine
        assert timeline.sent[rank] == sum(4 * n for source, _, n, _ in messages if source == rank)
        for lane in ("compute", "link"):
            require_apart([s for s in timeline.spans if (s.rank, s.lane) == (rank, lane)])
    into = [s for s in timeline.spans if s.label.startswith("send")]
    for rank in range(ranks):
        require_apart([s for s in into if s.label == f"send to {rank}"])
    assert all(s.end - s.start >= 0.05 + 4 / 100 - 1e-12 for s in into)
    least = earliest(ranks, events, network.inside)
    total = sum(s.end - s.start for s in timeline.spans)
    assert least - 1e-9 <= timeline.seconds <= total
    free = simulate(lambda r, n: play(r, events), ranks, network=FREE)
    assert free.seconds == pytest.approx(earliest(ranks, events, FREE.inside), abs=1e-9)


def require_apart(found):
    """Messages of one port and computing of one lane never overlap."""
    found = [s for s in found if s.label.startswith("send") or s.lane == "compute"]
    for before, after in pairwise(sorted(found, key=lambda s: s.start)):
        assert after.start >= before.end - 1e-12


def pipeline(microbatches, ahead):
    """Stages that compute forward (1 s) up to `ahead(rank, ranks)` micro-batches before backward
    (2 s); each keeps 1 byte of activations from forward to backward."""

    def program(rank, ranks):
        done = 0
        for number in range(microbatches):
            if rank > 0:
                yield Receive(rank - 1, ONE)
            yield Hold(1, "activations")
            yield Compute(1.0, f"forward {number}")
            if rank < ranks - 1:
                yield Send(rank + 1, ONE)
            if number + 1 >= ahead(rank, ranks):
                yield from backward(rank, ranks, done)
                done += 1
        for number in range(done, microbatches):
            yield from backward(rank, ranks, number)

    def backward(rank, ranks, number):
        if rank < ranks - 1:
            yield Receive(rank + 1, ONE)
        yield Compute(2.0, f"backward {number}")
        yield Hold(-1, "activations")
        if rank > 0:
            yield Send(rank - 1, ONE)

    return program


@pytest.mark.parametrize("stages, microbatches", [(2, 2), (4, 4), (4, 8), (8, 32)])
def test_pipelines_have_their_bubble_and_their_memory(stages, microbatches):
    gpipe = simulate(pipeline(microbatches, lambda r, p: microbatches), stages, network=FREE)
    one_by_one = simulate(pipeline(microbatches, lambda r, p: p - r), stages, network=FREE)
    for timeline in (gpipe, one_by_one):
        busy = [timeline.busy(rank) for rank in range(stages)]
        assert busy == [3.0 * microbatches] * stages
        assert timeline.seconds / busy[0] - 1 == (stages - 1) / microbatches
    assert gpipe.peak == [microbatches] * stages
    assert one_by_one.peak == [stages - rank for rank in range(stages)]


def test_a_deadlock_says_who_waits_for_whom():
    def meet():
        yield Meet("sum", (0, 1, 2), 1.0)

    def wait():
        yield Wait((yield Begin(receiver(0)())))

    with pytest.raises(RuntimeError, match=r"rank 0 .* a tensor from rank 1.*rank 1 .* rank 0"):
        run(receiver(1), receiver(0))
    with pytest.raises(RuntimeError, match=r"rank 0 .* waits for 1, 2 to come to 'sum'"):
        run(meet, sender(), sender())
    text = r"rank 1 \(compute\) waits for what it began; rank 1 \(link\) waits for a tensor from"
    with pytest.raises(RuntimeError, match=text):
        run(sender(), wait)
    with pytest.raises(RuntimeError, match="rank 1 did not receive all that rank 0 sent"):
        run(sender(1), sender())


def yields(*requests):
    def program():
        yield from requests

    return program


@pytest.mark.parametrize(
    "programs, match",
    [
        ([yields(Send(1, ONE))], "rank 0 of 1 asks for rank 1"),
        ([yields(Send(0, ONE))], "asks for rank 0; name another one"),
        ([yields(Receive(-1, ONE))], "asks for rank -1"),
        ([sender(1), yields(Receive(0, torch.ones(2)))], r"expects \(2,\) .* sent \(1,\)"),
        ([yields(Compute(-1.0))], "asks for -1.0 seconds"),
        ([yields(Compute(inf))], "asks for inf seconds"),
        ([yields(Meet("x", (1, 2), 1.0))], "every member comes once"),
        ([yields(Meet("x", (0, 1), 1.0)), yields(Meet("x", (0, 1), 2.0))], "same members"),
        ([yields(Wait("handle"))], "waits for 'handle'"),
        ([yields(Hold(5), Hold(-6))], "gives 6 bytes .* holds 5"),
        ([yields("nothing")], "rank 0 yields 'nothing'"),
        ([lambda: None], "a generator is needed"),
    ],
)
def test_requests_that_make_no_sense_are_refused(programs, match):
    with pytest.raises(ValueError, match=match):
        run(*programs)


def test_bad_ranks_factors_and_nodes_are_refused():
    with pytest.raises(ValueError, match="ranks is 0"):
        simulate(lambda r, n: sender()(), 0)
    with pytest.raises(ValueError, match="slow holds 1 factors for 2 ranks"):
        run(sender(), sender(), slow=[1.0])
    with pytest.raises(ValueError, match="slow is 0"):
        run(sender(), slow=[0.0])
    with pytest.raises(ValueError, match="node is 0"):
        Network(LINK, node=0)


def test_an_error_in_a_program_says_which_rank():
    def broken():
        yield Compute(2.0)
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost") as caught:
        run(sender(), broken)
    assert caught.value.__notes__ == ["in a program of rank 1, at 2 s"]
