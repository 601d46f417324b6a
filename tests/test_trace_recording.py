"""Peaks and categories of recordings made by hand, and deep peaks from shallow ones; no torch."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.trace import depth
from bench.trace.depth import Depths, choose_depths, phase_peaks, shallow_config
from bench.trace.recording import HOST, Mark, Recording, Storage


class Script:
    """Writes a recording: `alloc` returns a storage's number, `free` ends it."""

    def __init__(self, vocab_size=1000, num_layers=3, rounding_bytes=1):
        self.storages, self.events, self.marks, self.ends = [], [], [], []
        self.facts = {
            "vocab_size": vocab_size,
            "num_layers": num_layers,
            "rounding_bytes": rounding_bytes,
            "num_ops": 0,
        }

    def phase(self, step, name):
        self.marks.append(Mark(len(self.events), step, name))

    def alloc(self, num_bytes, layer=None, category=None, shape=(), recompute=None):
        mark = self.marks[-1]
        self.storages.append(
            Storage(
                number=len(self.storages),
                num_bytes=num_bytes,
                shape=shape,
                dtype="float32",
                op="op",
                module="",
                layer=layer,
                phase=mark.phase,
                step=mark.step,
                allocated_at=len(self.events),
                category=category,
                recompute=recompute,
            )
        )
        self.events.append(len(self.storages) - 1)
        return len(self.storages) - 1

    def free(self, number):
        self.storages[number].freed_at = len(self.events)
        self.events.append(~number)

    def done(self):
        return Recording(
            storages=self.storages,
            events=self.events,
            marks=self.marks,
            recompute_ends=self.ends,
            **self.facts,
        )


def test_live_bytes_rise_and_fall_with_the_events():
    s = Script()
    s.phase(0, "load")
    a = s.alloc(10)
    b = s.alloc(5)
    s.free(a)
    s.free(b)
    assert list(s.done().live_bytes()) == [10, 15, 5, 0]


def test_a_peak_belongs_to_the_place_of_the_allocation_that_made_it():
    s = Script()
    s.phase(1, "forward")
    s.alloc(1)
    kept = s.alloc(10, layer=0)
    brief = s.alloc(20, layer=1)
    s.free(brief)
    s.alloc(3)
    s.phase(1, "backward")
    s.free(kept)
    s.alloc(4, layer=1)
    peaks = s.done().peaks(1)
    assert {place: peak.num_bytes for place, peak in peaks.items()} == {
        ("forward", "before", 0): 1,
        ("forward", "layer", 0): 11,
        ("forward", "layer", 1): 31,
        ("forward", "after", 0): 14,
        ("backward", "before", 0): 14,
        ("backward", "layer", 1): 8,
    }
    assert s.done().peaks(2) == {}


def test_categories_tell_what_outlives_its_phase():
    s = Script(vocab_size=7)
    s.phase(0, "load")
    weight = s.alloc(1, category="weights")
    s.phase(1, "forward")
    saved, scratch = s.alloc(2), s.alloc(4)
    s.free(scratch)
    logits = s.alloc(8, shape=(3, 7))
    s.phase(1, "backward")
    s.free(saved)
    gradient = s.alloc(16, category="gradients")
    s.phase(1, "optimizer")
    root, state = s.alloc(32), s.alloc(64)
    s.free(root)
    s.free(gradient)
    s.phase(1, "save")
    r = s.done()
    names = {weight: "weights", saved: "activations", scratch: "temporary", logits: "logits"}
    names |= {gradient: "gradients", root: "temporary", state: "optimizer"}
    assert {n: r.category(s.storages[n]) for n in names} == names


def test_terms_add_up_and_the_host_counts_nothing():
    s = Script(rounding_bytes=512)
    s.phase(0, "load")
    s.alloc(1, category="weights")
    s.alloc(10_000, category=HOST)
    s.alloc(513, category="adapters")
    recording = s.done()
    terms = recording.terms_at(2)
    assert (terms["weights"], terms["adapters"]) == (512, 1024)
    assert sum(terms.values()) == list(recording.live_bytes())[-1] == 1536
    assert [key for key, _ in recording.requests()] == [0, 2]


def test_states_made_in_the_backward_are_optimizer_states():
    s = Script()
    s.phase(1, "backward")
    s.alloc(8)
    s.phase(2, "forward")
    assert s.done().category(s.storages[0]) == "optimizer"


def test_the_timeline_adds_up_to_the_live_bytes():
    s = Script()
    s.phase(1, "forward")
    a = s.alloc(3)
    s.alloc(4, category="weights")
    s.free(a)
    lines = s.done().live_by_category()
    assert [sum(values) for values in zip(*lines.values(), strict=True)] == list(s.done().live_bytes())


def step_of(num_layers, per_layer, first_extra, loss):
    """A step whose backward peaks in the first layer, where all gradients are, or in the loss."""
    s = Script(num_layers=num_layers)
    s.phase(2, "backward")
    top = s.alloc(loss)
    s.free(top)
    for layer in reversed(range(num_layers)):
        s.alloc(per_layer, layer=layer)
        scratch = s.alloc(first_extra if layer == 0 else 1, layer=layer)
        s.free(scratch)
    return s.done()


@given(st.integers(0, 100), st.integers(0, 1000), st.integers(0, 10_000), st.integers(5, 200))
def test_shallow_models_give_the_deep_ones_peak_wherever_it_is(per_layer, first_extra, loss, num_layers):
    depths = choose_depths(["a"] * num_layers)
    shallow = [step_of(n, per_layer, first_extra, loss) for n in depths.shallow]
    whole = [step_of(num_layers, per_layer, first_extra, loss)]
    deep = phase_peaks(whole, Depths(num_layers, None), 2)["backward"]
    assert phase_peaks(shallow, depths, 2)["backward"].num_bytes == deep.num_bytes


@given(
    st.text("ab", max_size=4), st.text("xyz", min_size=1, max_size=4), st.integers(1, 12), st.integers(0, 3)
)
def test_depths_keep_the_start_a_period_and_the_end(start, period, repeats, more):
    kinds = start + period * repeats + period[:more]
    depths = choose_depths(kinds)
    if depths.shallow is None:
        return
    first, second = depths.shallow
    step = second - first
    assert 3 <= first < second < len(kinds)
    assert (len(kinds) - first) % step == 0
    regular = kinds[depths.irregular :]
    assert regular[:-step] == regular[step:]
    assert set(kinds[:first]) == set(kinds)


@pytest.mark.parametrize(("kinds", "shallow"), [("", None), ("a", None), ("aaa", None), ("aaaaa", (3, 4))])
def test_few_layers_are_all_traced(kinds, shallow):
    assert choose_depths(kinds).shallow == shallow


def test_a_shallow_config_cuts_lists_of_one_entry_per_layer():
    config = {"n_layer": 4, "layer_types": ["a", "b", "a", "b"], "eos": [1, 2], "hidden_size": 8}
    assert shallow_config(config, 2, 4, "n_layer") == {**config, "n_layer": 2, "layer_types": ["a", "b"]}
    nested = {"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 4}}
    cut = shallow_config(nested, 3, 4, "num_hidden_layers")
    assert cut == {"text_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 4}}


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(depth).failed == 0
