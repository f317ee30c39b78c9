"""The wire trusts nothing: every message comes through whole, and anything else is a WireError and costs nothing."""

from __future__ import annotations

import ast
import dataclasses
import random
import tracemalloc
import types
import typing
from pathlib import Path

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from danaz.optimizers import SGD, Adam, Optimizers
from danaz.protocol import inbox, wire
from danaz.protocol.messages import (
    MAX_REPORTED,
    AtMost,
    Bye,
    Fetch,
    Fetched,
    Final,
    GoBack,
    Heartbeat,
    Inquire,
    Join,
    Leave,
    Machine,
    Message,
    Noted,
    Offer,
    Parameters,
    Plan,
    Progress,
    Pull,
    Push,
    Refusal,
    Reply,
    Report,
    Request,
    Spent,
    Within,
)
from danaz.protocol.wire import MAGIC, MESSAGES, WireError, decode, encode
from danaz.vectors.layout import Layout

# ---- every message, with anything in its fields --------------------------------------------------------------------

NUMBERS = st.floats(allow_nan=False)
TENSORS = st.lists(st.floats(width=32, allow_nan=False), max_size=9).map(lambda values: torch.tensor(values))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    shapes = st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=4)

    def table(kind: str) -> list[list[object]]:
        rows = []
        for shape in draw(shapes):
            stride = torch.empty(shape).stride()
            rows.append([f"{kind}{len(rows)}{draw(st.text(max_size=5))}", shape, list(stride)])
        return rows

    parameters = table("p")
    size = sum(torch.Size(row[1]).numel() for row in parameters)
    first = draw(st.integers(0, size))
    return Layout.from_lists([parameters, table("b"), [first, size - first]])


PLAIN = {
    float: NUMBERS,
    bool: st.booleans(),
    str: st.text(max_size=20),
    type(None): st.none(),
    Tensor: TENSORS,
    Layout: layouts(),
    Optimizers: st.sampled_from([SGD, Optimizers([Adam(0.5), Adam(amsgrad=True)])]),
    Plan: st.builds(Plan, st.integers(1, 2**26), st.integers(1, 2**27))
    | st.lists(st.integers(1, 2**50), min_size=1, max_size=6).map(Plan.of),
    Machine: st.builds(Machine, st.text(max_size=20), st.integers(0, 2**53), st.text(max_size=20)),
    Spent: st.builds(Spent, *[st.floats(0, 2**53)] * 4),
}


def of_type(hint: typing.Any) -> st.SearchStrategy[typing.Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return in_range(*arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(of_type, arguments))
    if origin is tuple and arguments[-1] is not Ellipsis:
        return st.tuples(*map(of_type, arguments))
    if origin is tuple:
        return st.lists(of_type(arguments[0]), max_size=5).map(tuple)
    if origin is dict:
        return st.dictionaries(of_type(arguments[0]), of_type(arguments[1]), max_size=4)
    return PLAIN[hint]


def in_range(kind: typing.Any, limit: Within | AtMost) -> st.SearchStrategy[typing.Any]:
    """Draw values that a field may hold, the bounds among them."""
    if isinstance(limit, AtMost):
        return of_type(kind)
    if kind is int:
        return st.integers(int(limit.low), int(limit.high))
    return st.floats(limit.low, limit.high)


def messages_of(kind: type) -> st.SearchStrategy[Message]:
    hints = typing.get_type_hints(kind, include_extras=True)
    travelling = [field.name for field in dataclasses.fields(kind) if not field.metadata.get("local")]
    return st.builds(kind, **{name: of_type(hints[name]) for name in travelling})


def same(one: object, other: object) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if dataclasses.is_dataclass(one) and not isinstance(one, (Layout, Plan)):
        fields = [field.name for field in dataclasses.fields(one)]
        return type(one) is type(other) and all(same(getattr(one, f), getattr(other, f)) for f in fields)
    return type(one) is type(other) and one == other


def through(frames: list[wire.Frame]) -> list[bytes]:
    """Return what the other side receives."""
    return [bytes(frame) for frame in frames]


class TestRoundTrip:
    def test_all_kinds_are_known(self):
        assert set(MESSAGES.values()) == {*typing.get_args(Request), *typing.get_args(Reply)}

    @pytest.mark.parametrize("kind", MESSAGES.values(), ids=MESSAGES)
    @given(data=st.data())
    @settings(max_examples=40, deadline=None)
    def test_what_is_sent_is_what_arrives(self, kind, data):
        message = data.draw(messages_of(kind))
        assert same(decode(through(encode(message))), message)

    def test_tensors_are_not_copied(self):
        """Sending copies no tensor, and receiving copies none if the frame is writable."""
        push = Push(0, 1, 1, 0, (0.1,), 1, None, 0, torch.arange(3.0))
        frames = encode(push)
        push.push[0] = 7
        received = [*frames[:2], bytearray(frames[2])]
        decoded = decode(received)
        assert decoded.push.tolist() == [7, 1, 2]
        decoded.push[1] = 8
        assert memoryview(received[2]).cast("f").tolist() == [7, 8, 2]

    def test_a_non_finite_number_travels(self):
        """The core refuses it, with the reason, and counts it."""
        push = Push(0, 1, 1, 0, (float("nan"),), 1, float("inf"), 0, torch.tensor([float("nan"), float("-inf")]))
        arrived = decode(through(encode(push)))
        assert str((arrived.lr, arrived.loss, arrived.push.tolist())) == "((nan,), inf, [nan, -inf])"

    @pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.float64), torch.zeros(2, 2)])
    def test_only_flat_float32_is_sent(self, tensor):
        with pytest.raises(TypeError, match="only flat float32"):
            encode(Push(0, 1, 1, 0, (0.1,), 1, None, 0, tensor))


# ---- what is not a message ---------------------------------------------------------------------------------------

LAYOUT = Layout.from_lists([[["w", [2, 2], [2, 1]], ["b", [2], [1]]], [["mean", [2], [1]]], [4, 2]])
SAMPLES: list[Message] = [
    Join(0, 1, 1, "digest", SGD, LAYOUT, Plan(3, 2), 1, torch.arange(6.0)),
    Push(1, 1, 2, 0, (0.1, 0.2), 4, 0.5, 3, torch.arange(6.0)),
    Heartbeat(1, 1),
    Parameters(2, 1, True, "", (4, 5), False, 0.5, 1, None, torch.arange(6.0)),
]


EVERY_KIND: list[Message] = [
    *SAMPLES,
    Pull(0, 1, 2),
    Fetch(0, 1, 2),
    Inquire(0, 1, 2),
    Inquire(0, 1, 2, wants_params=True),
    Progress(1, 0.5),
    Progress(1, 0.5, torch.zeros(1)),
    Fetched(1, torch.zeros(1)),
    Leave(0, 1, 2, None, torch.zeros(1)),
    Report(0, 1, 2, {}),
    Bye(0, 1, 2),
    GoBack(0, 1, -1),
    Final(2, 1, False, torch.zeros(1), torch.zeros(1)),
    Noted(1),
    Refusal(1, "no", False),
    Offer(1, (0,), 1, False),
]


def rejected(frames: typing.Sequence[wire.Frame], match: str | None = None, expect: typing.Any = Message) -> None:
    with pytest.raises(WireError, match=match):
        decode(frames, expect)


def header(kind: str, present: list[object] | None = None, **fields: object) -> bytes:
    vectors = [[name, 1, "fp32"] if isinstance(name, str) else name for name in present or []]
    return msgpack.packb([kind, fields, vectors])


def leave(**others: object) -> bytes:
    """Return the header of a Leave without vectors, as far as fields go that come before ``spent``."""
    fields = {"worker": 0, "incarnation": 1, "request": 2, "give_back": None, "buffers": None}
    return header("Leave", [["buffers", 0, "fp32"]], **fields, done=True, stop="", generation=0, **others)


def test_a_recording_from_before_times_were_told_is_read():
    found = decode([MAGIC, leave(), b""], Request)
    assert found.spent == Spent()
    found = decode([MAGIC, leave(spent=[1.0, 2.0, 3.0, 4.0]), b""], Request)
    assert found.spent == Spent(computing=1.0, exchanging=2.0, waiting=3.0, reading=4.0)


class TestGarbage:
    @pytest.mark.parametrize(
        ("frames", "why"),
        [
            ([], "not a message"),
            ([b""], "not a message"),
            ([b"", b""], "not a message"),
            ([b"GET / HTTP/1.1", b"\x93"], "not a message"),
            ([MAGIC], "not a message"),
            ([MAGIC[:-1] + b"\x01", header("Noted", request=1)], "not a message of this version"),
            ([MAGIC, b""], "not readable"),
            ([MAGIC, b"\xc1"], "not readable"),
            ([MAGIC, b"\x93\x01"], "not readable"),
            ([MAGIC, msgpack.packb(1)], "not readable"),
            ([MAGIC, msgpack.packb([1, 2])], "not readable"),
            ([MAGIC, msgpack.packb([1, {}, []])], "malformed"),
            ([MAGIC, msgpack.packb(["Noted", [], []])], "malformed"),
            ([MAGIC, msgpack.packb(["Noted", {}, None])], "malformed"),
            ([MAGIC, msgpack.packb(["__import__", {}, []])], "unknown"),
            ([MAGIC, header("Noted")], "request is missing"),
            ([MAGIC, header("Noted", request=1, extra=2)], "does not have"),
            ([MAGIC, header("Noted", request="1")], "request has the wrong type"),
            ([MAGIC, header("Noted", request=True)], "request has the wrong type"),
            ([MAGIC, header("Noted", request=1.0)], "request has the wrong type"),
            ([MAGIC, header("Noted", request=None)], "request has the wrong type"),
            ([MAGIC, header("Noted", request=1), b"\0\0\0\0"], "number of tensor frames"),
            ([MAGIC, header("Noted", ["request"], request=1)], "number of tensor frames"),
            ([MAGIC, header("Noted", ["request"], request=None), b"\0\0\0\0"], "request has the wrong type"),
            ([MAGIC, header("Noted", [7], request=1), b"\0\0\0\0"], "malformed"),
            ([MAGIC, header("Noted", ["tail"], request=1), b"\0\0\0\0"], "does not have"),
            ([MAGIC, leave(spent=None), b""], "spent has the wrong type"),
            ([MAGIC, leave(spent=[1.0, 2.0]), b""], "spent has the wrong type"),
            ([MAGIC, leave(spent=[1.0, 2.0, 3.0, "4"]), b""], "spent has the wrong type"),
            ([MAGIC, leave(spent=[1.0, 2.0, 3.0, -4.0]), b""], "spent is out of range"),
            ([MAGIC, leave(spent=[1.0, 2.0, 3.0, float("nan")]), b""], "spent is out of range"),
        ],
    )
    def test_it_is_named(self, frames, why):
        rejected(frames, why)

    @pytest.mark.parametrize(
        "layout",
        [
            None,
            [],
            [1, 2, 3],
            [[], [], [1]],
            [[["w", [2], [1]]], [], []],
            [[["w", [2], [2]]], [], [2]],  # with holes
            [[["w", [2], [0]]], [], [2]],  # all in one place
            [[["w", [2], [1, 1]]], [], [2]],
            [[["w", [-2], [1]]], [], [-2]],
            [[["w", [2], [1]]], [], [3, -1]],
            [[["w", [1.5], [1]]], [], [1.5, 0.5]],
            [[["w", [float("inf")], [1]]], [], [1]],
            [[["w", [float("nan")], [1]]], [], [1]],
            [[["w", None, None]], [], [1]],
            [[["w"]], [], [1]],
            [[["w", "2", "1"]], [], [2]],
            {"a": 1, "b": 2, "c": 3},
            "abc",
        ],
    )
    def test_a_malformed_layer_table(self, layout):
        join = msgpack.unpackb(bytes(encode(SAMPLES[0])[1]))
        join[1]["layout"] = layout
        rejected([MAGIC, msgpack.packb(join), bytes(24)], "layout has the wrong type")

    @pytest.mark.parametrize(
        "plan",
        [
            *([1], [1, 2, 3], ["1", 2], [1.0, 2], [None, None], {"a": 1}),
            *([1, 2, []], [1, 2, [1]], [1, 2, [1, 1]], [1, 2, [2, 1]], [1, 2, [1, "2"]], [1, 1, [1, 2]]),
        ],
    )
    def test_a_malformed_plan(self, plan):
        join = msgpack.unpackb(bytes(encode(SAMPLES[0])[1]))
        join[1]["plan"] = plan
        rejected([MAGIC, msgpack.packb(join), bytes(24)], "plan has the wrong type")

    def test_a_push_of_an_earlier_version_says_nothing_of_the_order(self):
        push = msgpack.unpackb(bytes(encode(dataclasses.replace(SAMPLES[1], order=7))[1]))
        del push[1]["order"]
        assert decode([MAGIC, msgpack.packb(push), bytes(24)]).order == 0

    def test_a_reply_is_no_request(self):
        frames = through(encode(Refusal(1, "no", False)))
        assert decode(frames, Reply) == Refusal(1, "no", False)
        rejected(frames, "unexpected kind", Request)

    def test_a_tensor_of_no_whole_floats(self):
        frames = through(encode(SAMPLES[1]))
        rejected([*frames[:2], frames[2][:-1]], "another size than announced")

    def test_a_tensor_over_the_limit(self, monkeypatch):
        frames = through(encode(SAMPLES[1]))
        monkeypatch.setattr(wire, "MAX_FLOATS", 5)
        rejected(frames, "too large")

    def test_a_header_over_the_limit(self, monkeypatch):
        frames = through(encode(SAMPLES[1]))
        monkeypatch.setattr(wire, "MAX_HEADER_BYTES", 10)
        rejected(frames, "header too large")

    @pytest.mark.parametrize(
        "packed",
        [
            b"\x91" * 100_000,  # nested deeper than any stack
            b"\xdd\xff\xff\xff\xff",  # an array of four thousand million
            b"\xdf\xff\xff\xff\xff",  # as large a map
            b"\xc6\xff\xff\xff\xff",  # four gigabytes of bytes
            b"\xdb\xff\xff\xff\xff",  # and of text
            b"\x93\xa4Push\x80\xdd\x00\xff\xff\xff",
            b"\xd6\xff\x00\x00\x00\x01",  # a timestamp
            b"\xc7\x00\x05",  # an extension type
            b"\x93\xc7\x00\x05\x80\x90",
            b"\x93\xa1\xff\x80\x90",  # not UTF-8
            b"\x93\xa4Push\x81\x01\x02\x90",  # a key that is no text
        ],
    )
    def test_promises_are_not_allocated(self, packed):
        """Memory follows what has arrived, not what is announced."""
        tracemalloc.start()
        rejected([MAGIC, packed])
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak_bytes < 64 * len(packed) + 100_000

    def test_a_table_that_says_it_is_huge(self):
        """The layout's own numbers allocate nothing either."""
        join = msgpack.unpackb(bytes(encode(SAMPLES[0])[1]))
        join[1]["layout"] = [[["w", [2**20, 2**20], [2**20, 1]]], [], [2**40]]
        frames = [MAGIC, msgpack.packb(join), bytes(24)]
        decode(frames)  # builds the checks for this kind of message, once
        tracemalloc.start()
        assert decode(frames).layout.size == 2**40
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak_bytes < 100_000


def every_number(kind: type) -> typing.Iterator[tuple[str, Within]]:
    """Yield (field, range) of each field that holds one number."""
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]
        for choice in choices:
            if typing.get_origin(choice) is typing.Annotated and isinstance(choice.__metadata__[0], Within):
                yield name, choice.__metadata__[0]


def plain_hints(hint: typing.Any) -> typing.Iterator[typing.Any]:
    """Yield all types that a hint is made of, except those with a declared range."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        if hint.__metadata__ and isinstance(hint.__metadata__[0], Within):
            return
        arguments = typing.get_args(typing.get_args(hint)[0])
        yield from (each for argument in arguments for each in plain_hints(argument))
    elif origin is not None:
        yield origin
        yield from (each for argument in typing.get_args(hint) for each in plain_hints(argument))
    else:
        yield hint


# The core judges these values itself: a worker whose training has diverged sends NaN and infinity in good faith.
ANY_FLOAT = {("Push", "lr"), ("Push", "loss"), ("Report", "figures"), ("Parameters", "gap")}


class TestRanges:
    """Each field declares what it may hold, and nothing else gets past the decoder."""

    def test_every_number_text_and_list_has_a_declared_limit(self):
        for kind in (*MESSAGES.values(), Plan):
            hints = typing.get_type_hints(kind, include_extras=True)
            for field in dataclasses.fields(kind):
                if field.metadata.get("local"):
                    continue
                found = set(plain_hints(hints[field.name]))
                if (kind.__name__, field.name) in ANY_FLOAT:
                    found.discard(float)
                assert not found & {int, float, str, tuple, dict, list}, f"{kind.__name__}.{field.name}"

    @pytest.mark.parametrize("kind", MESSAGES.values(), ids=MESSAGES)
    def test_a_number_beyond_its_range(self, kind):
        numbers = list(every_number(kind))
        assert numbers
        message = next(m for m in EVERY_KIND if type(m) is kind)
        for name, limit in numbers:
            for hostile in (limit.low - 1, limit.high + 1, -(2**63), 2**64 - 1, float("nan")):
                frames = through(encode(message))
                kind_name, fields, present = msgpack.unpackb(frames[1])
                fields[name] = int(hostile) if hostile == hostile and limit.high != float("inf") else hostile
                rejected([MAGIC, msgpack.packb([kind_name, fields, present]), *frames[2:]], f"field {name} ")

    @pytest.mark.parametrize(
        ("message", "field", "value"),
        [
            (Push(1, 1, 2, 0, (0.1,), 4, 0.5, 3, torch.ones(1)), "lr", [0.1] * 5000),
            (Push(1, 1, 2, 0, (0.1,), 4, 0.5, 3, torch.ones(1)), "earlier", [1] * 70_000),
            (Push(1, 1, 2, 0, (0.1,), 4, 0.5, 3, torch.ones(1)), "earlier", [-1]),
            (Push(1, 1, 2, 0, (0.1,), 4, 0.5, 3, torch.ones(1)), "squares", [float("nan")]),
            (Push(1, 1, 2, 0, (0.1,), 4, 0.5, 3, torch.ones(1)), "common", [1] * 5000),
            (Report(0, 1, 2, {}), "figures", {str(n): 1.0 for n in range(MAX_REPORTED + 1)}),
            (Report(0, 1, 2, {}), "figures", {"x" * 101: 1.0}),
            (Report(0, 1, 2, {}), "figures", {"x": "y" * 1001}),
            (Join(0, 1, 1, "", SGD, Layout.from_lists([[], [], []]), Plan(1, 1), 1), "digest", "d" * 1001),
            (Join(0, 1, 1, "", SGD, Layout.from_lists([[], [], []]), Plan(1, 1), 1), "plan", [2**30, 2**30]),
            (Join(0, 1, 1, "", SGD, Layout.from_lists([[], [], []]), Plan(1, 1), 1), "plan", [0, 1]),
            (Join(0, 1, 1, "", SGD, Layout.from_lists([[], [], []]), Plan(1, 1), 1), "plan", [1, 2, [1, 0]]),
            (Join(0, 1, 1, "", SGD, Layout.from_lists([[], [], []]), Plan(1, 1), 1), "plan", [1, 2, [1, 2**53]]),
        ],
    )
    def test_a_list_or_text_beyond_its_range(self, message, field, value):
        frames = through(encode(message))
        kind, fields, present = msgpack.unpackb(frames[1])
        fields[field] = value
        rejected([MAGIC, msgpack.packb([kind, fields, present]), *frames[2:]], f"field {field} is out of range")

    @pytest.mark.parametrize(
        "layout",
        [
            [[["w", [2**41], [1]]], [], [2**41]],
            [[["w", [2**21, 2**20], [2**20, 1]]], [], [2**41]],
            [[["w", [0, 2**41], [1, 1]]], [], [0]],
            [[["w", [0], [2**41]]], [], [0]],
            [[["v", [2**39], [1]], ["w", [2**39 + 1], [1]], ["x", [2**39], [1]]], [], [3 * 2**39 + 1]],
            [[["w", [1] * 65, [1] * 65]], [], [1]],
            [[["w", [2**63] * 10_000, [1] * 10_000]], [], [1]],
            [[["w" * 1001, [1], [1]]], [], [1]],
            [[["w", [1], [1]], ["w", [1], [1]]], [], [2]],
            [[["__metadata__", [1], [1]]], [], [1]],
            [[[str(n), [1], [1]] for n in range(40_000)], [], [40_000]],
            [[], [[str(n), [1], [1]] for n in range(40_000)], []],
            [[["w", [1], [1]]], [], [1] + [0] * 5000],
        ],
        ids=range(13),
    )
    def test_a_layer_table_beyond_its_limits(self, layout):
        join = msgpack.unpackb(bytes(encode(SAMPLES[0])[1]))
        join[1]["layout"] = layout
        rejected([MAGIC, msgpack.packb(join), bytes(24)], "layout has the wrong type")

    def test_a_header_that_would_not_travel_is_not_sent(self, monkeypatch):
        monkeypatch.setattr(wire, "MAX_HEADER_BYTES", 20)
        with pytest.raises(ValueError, match="header of a Join takes"):
            encode(SAMPLES[0])


class TestFuzz:
    """decode() raises nothing but WireError, and never takes long."""

    def test_mutated_messages(self):
        rng = random.Random(1)
        originals = [through(encode(message)) for message in SAMPLES]
        survived = sum(self.survives(mutate(rng.choice(originals), rng)) for _ in range(20_000))
        assert 100 < survived < 19_900, "some mutations only change a number; most must be refused"

    def test_random_headers(self):
        rng = random.Random(2)
        for _ in range(20_000):
            self.survives([MAGIC, rng.randbytes(rng.randrange(40)), *[rng.randbytes(4)] * rng.randrange(3)])

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
            max_leaves=20,
        ),
        st.sampled_from(SAMPLES),
        st.randoms(use_true_random=False),
    )
    @settings(max_examples=300, deadline=None)
    def test_well_formed_nonsense_in_any_field(self, nonsense, message, rng):
        frames = through(encode(message))
        kind, fields, present = msgpack.unpackb(frames[1])
        fields[rng.choice(list(fields))] = nonsense
        self.survives([MAGIC, msgpack.packb([kind, fields, present]), *frames[2:]])

    def survives(self, frames: list[bytes]) -> bool:
        try:
            message = decode(frames)
        except WireError:
            return False
        assert type(message) in MESSAGES.values()
        return True


def mutate(frames: list[bytes], rng: random.Random) -> list[bytes]:
    """Flip, cut, repeat or insert bytes, or drop, double or swap frames, once or twice."""
    frames = list(frames)
    for _ in range(rng.randint(1, 2)):
        which = rng.randrange(len(frames)) if frames else 0
        frame = bytearray(frames[which]) if frames else bytearray()
        at = rng.randrange(len(frame) + 1)
        match rng.randrange(7):
            case 0 if frame:
                frame[at % len(frame)] ^= 1 << rng.randrange(8)
            case 1:
                del frame[at:]
            case 2:
                frame[at:at] = rng.randbytes(rng.randint(1, 8))
            case 3:
                frame[at:at] = frame[at:]
            case 4:
                frames.insert(which, bytes(frame))
                continue
            case 5 if frames:
                frames.pop(which)
                continue
            case 6:
                rng.shuffle(frames)
                continue
        frames[which : which + 1] = [bytes(frame)]
    return frames


@pytest.mark.parametrize("module", [wire, inbox], ids=["wire", "inbox"])
def test_no_pickle_is_within_reach(module):
    """torch.load, numpy.load and marshal unpickle, too."""
    tree = ast.parse(Path(module.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported <= {"dataclasses", "struct", "types", "typing", "msgpack", "torch"}
    called = {
        node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert not called & {"load", "loads", "eval", "exec", "__reduce__"}


def test_a_pickle_is_garbage():
    import pickle

    payload = pickle.dumps(Pull(0, 1, 2))
    for frames in (
        [payload],
        [payload, payload],
        [MAGIC, payload],
        [MAGIC, header("Noted", ["x"], request=1), payload],
    ):
        rejected(frames)
    assert decode(through(encode(Noted(3)))) == Noted(3)


def test_a_question_of_an_earlier_version_wants_no_parameters() -> None:
    frames = [MAGIC, header("Inquire", worker=0, incarnation=1, request=2)]
    assert decode(frames, Message) == Inquire(0, 1, 2, wants_params=False)
