"""The tape by hand: what a block saves, and the peaks of its forward, backward and recomputation."""

from hypothesis import given
from hypothesis import strategies as st

from planner.tape import (
    CATEGORIES,
    GRADIENTS,
    LOGITS,
    WORKSPACE,
    Peaks,
    Tape,
    constant,
    evaluate,
    per_token,
)

TOKENS, SEQ_LEN = 10, 5


def total(peaks, tokens=TOKENS, seq_len=SEQ_LEN):
    return sum(peaks.at(tokens, seq_len).values())


def saved_bytes(memory):
    return sum(evaluate(size, TOKENS, SEQ_LEN) for size in memory.saved)


def chain(*sizes, saved=()):
    """x -> one operation per size; those whose number is in `saved` save their input. Sizes are constants."""
    tape = Tape()
    x = tape.input(constant(7), 1)
    for number, size in enumerate(sizes):
        x = tape.run([x], constant(size), 1, saves=[x] if number in saved else [])
    return tape


def test_a_size_grows_with_tokens_and_with_their_product_with_the_length():
    assert evaluate((1.0, 2.0, 3.0, 4.0), 10, 5) == 1 + 20 + 150 + 100


def test_what_is_saved_counts_once_and_the_blocks_input_never():
    tape = Tape()
    x = tape.input(constant(100), 1)
    a = tape.run([x], constant(10), 1, saves=[x])
    b = tape.run([a], constant(20), 1, saves=[a])
    tape.run([a, b], constant(40), 1, saves=[a, b])
    memory = tape.play()
    assert saved_bytes(memory) == 10 + 20
    assert memory.saves_input


def test_a_block_that_saves_no_input_says_so():
    assert not chain(10, 20, saved={1}).play().saves_input


def test_an_unsaved_output_dies_at_its_last_use():
    # after each operation: 10, 10 + 20, 20 + 30
    assert total(chain(10, 20, 30).play().forward) == 50


def test_a_held_tensor_outlives_its_last_use():
    tape = Tape()
    x = tape.input(constant(7), 1)
    a = tape.run([x], constant(10), 1)
    b = tape.run([a], constant(20), 1)
    tape.run([b], constant(30), 1)
    tape.hold(a)
    assert total(tape.play().forward) == 60


def test_a_saved_output_lives_to_the_forwards_end_and_not_without_gradients():
    memory = chain(10, 20, 30, saved={1}).play()
    assert total(memory.forward) == 60
    assert total(memory.no_grad) == 50


def test_a_temporary_counts_beside_its_output_only():
    tape = Tape()
    x = tape.input(constant(7), 1)
    a = tape.run([x], constant(10), 1, temp=constant(100))
    tape.run([a], constant(20), 1)
    assert tape.play().forward.at(TOKENS, SEQ_LEN) == {
        "activations": 10,
        "logits": 0,
        "workspace": 100,
        "gradients": 0,
    }


def test_the_backward_holds_saved_tensors_both_gradients_and_temporaries():
    tape = Tape()
    x = tape.input(constant(3), 1)
    a = tape.run([x], constant(10), 1, saves=[x])
    tape.run([a], constant(20), 1, saves=[a], grad_temp=constant(1000))
    # last operation: saved a 10, gradients of its output 20 and of a 10, temporary 1000
    assert total(tape.play().backward) == 10 + 20 + 10 + 1000


def test_a_saved_tensor_is_freed_by_its_first_savers_backward():
    tape = Tape()
    x = tape.input(constant(0), 1)
    a = tape.run([x], constant(100), 1)
    b = tape.run([a], constant(0), 1, saves=[a])
    c = tape.run([b], constant(0), 1)
    tape.run([a, c], constant(0), 1, saves=[a])
    # saved a stays until the second operation's backward is done: a 100, its gradient 100, in place the second one 100
    assert total(tape.play().backward) == 300


def test_weight_gradients_stay_and_those_of_frozen_weights_are_not_made():
    tape = Tape()
    x = tape.input(constant(0), 1)
    a = tape.run([x], constant(10), 1, weight_grad=constant(100))
    tape.run([a], constant(10), 1, weight_grad=constant(500))
    memory = tape.play()
    assert memory.backward.at(TOKENS, SEQ_LEN)["gradients"] == 600
    assert memory.weight_gradients == constant(600)
    assert chain(10, 10).play().weight_gradients == constant(0)


def test_an_addition_passes_its_gradient_on_without_a_copy():
    def peak(shares_grad):
        tape = Tape()
        x, y = tape.input(constant(10), 1), tape.input(constant(10), 1)
        tape.run([x, y], constant(10), 1, shares_grad=shares_grad)
        return total(tape.play().backward)

    assert peak(shares_grad=True) == 10
    assert peak(shares_grad=False) == 30


def test_an_addition_of_two_widths_copies_only_the_narrow_gradient():
    tape = Tape()
    narrow, wide = tape.input(constant(10), 2), tape.input(constant(20), 4)
    tape.run([narrow, wide], constant(20), 4, shares_grad=True)
    assert total(tape.play().backward) == 20 + 10


def test_a_second_gradient_is_added_in_place():
    tape = Tape()
    x = tape.input(constant(10), 1)
    a = tape.run([x], constant(1), 1)
    b = tape.run([x], constant(1), 1)
    tape.run([a, b], constant(1), 1)
    # b's backward makes x's gradient (10); a's makes the second (10) beside a's own gradient (1)
    assert total(tape.play().backward) == 10 + 10 + 1


def test_a_gradient_that_another_tensor_shares_is_not_added_to_in_place():
    tape = Tape()
    x = tape.input(constant(10), 1)
    y = tape.run([x], constant(10), 1)
    z = tape.run([x], constant(10), 1)
    both = tape.run([x, y], constant(10), 1, shares_grad=True)
    tape.run([both, z], constant(10), 1, shares_grad=True)
    # x, y and z share one gradient (10); z's backward makes a second one for x (10) while y still needs the shared
    # one, so the sum is a third tensor (10)
    assert total(tape.play().backward) == 30


def test_no_gradient_flows_where_none_is_wanted():
    tape = Tape()
    x = tape.input(constant(1000), 1, needs_grad=False)
    a = tape.run([x], constant(10), 1, saves=[x])
    b = tape.run([a], constant(10), 1, weight_grad=constant(1), saves=[a])
    tape.run([b], constant(10), 1)
    memory = tape.play()
    assert not memory.saves_input
    # last: output 10 + b's 10 beside the saved a 10; then b's 10 + a 10 + the weight's 1
    assert total(memory.backward) == 30


def test_a_tensor_without_a_gradient_can_wait_for_the_backward():
    tape = Tape()
    x = tape.input(constant(0), 1)
    stash = tape.run([x], constant(50), 1, saves_output=True)
    stash.needs_grad = False
    tape.run([x, stash], constant(10), 1)
    memory = tape.play()
    assert saved_bytes(memory) == 50
    assert total(memory.backward) == 60


def test_what_is_kept_behind_a_checkpoints_back_is_saved_and_counted_apart():
    tape = Tape()
    x = tape.input(constant(5), 1)
    a = tape.run([x], constant(10), 1)
    tape.run([a], constant(20), 1)
    tape.keep(x, a)
    memory = tape.play()
    assert not memory.saves_input
    assert saved_bytes(memory) == 0
    assert sum(evaluate(size, TOKENS, SEQ_LEN) for size in memory.kept) == 10
    assert sum(evaluate(size, TOKENS, SEQ_LEN) for size in tape.play(is_reentrant=True).kept) == 0


def test_nothing_is_kept_for_a_backward_that_never_comes():
    tape = Tape()
    x = tape.input(constant(5), 1, needs_grad=False)
    a = tape.run([x], constant(10), 1)
    tape.run([a], constant(20), 1)
    tape.keep(a)
    assert saved_bytes(tape.play()) == 0


def test_categories_are_kept_apart():
    tape = Tape()
    x = tape.input(constant(0), 1)
    logits = tape.run([x], per_token(2), 1, category=LOGITS)
    tape.run([logits], constant(0), 1, saves=[logits], weight_grad=constant(5))
    memory = tape.play()
    assert evaluate(memory.saved[LOGITS], TOKENS, SEQ_LEN) == 2 * TOKENS
    assert CATEGORIES[GRADIENTS] == "gradients"
    assert CATEGORIES[WORKSPACE] == "workspace"
    assert memory.backward.at(TOKENS, SEQ_LEN) == {
        "activations": 0,
        "logits": 2 * (2 * TOKENS),
        "workspace": 0,
        "gradients": 5,
    }


class TestRecomputation:
    """A checkpointed block: its forward again in the backward."""

    @staticmethod
    def tape():
        """input -> 10 -> 20 (saves the 10) -> 40 (saves nothing) -> 80 (saves nothing)"""
        return chain(10, 20, 40, 80, saved={1})

    def test_it_starts_when_a_saved_tensor_is_asked_for_and_stops_before_the_last_saver_runs(self):
        # gradients of the last two operations' outputs come first: 20 is waiting; then only the 10 is remade.
        # Highest before that: 80 + 40 (last operation's backward, with the remade 10 counted as saved): 130
        assert total(self.tape().play().recompute) == 130

    def test_gradients_made_before_the_recomputation_wait_for_it(self):
        tape = chain(100, 20, 30, saved={1})
        # waiting: the second output's gradient 20; recomputed: 100. In the backward: 100 + 20 + 100
        assert total(tape.play().recompute) == 220

    def test_reentrant_starts_at_once_runs_to_the_end_and_keeps_the_output(self):
        memory = self.tape().play(is_reentrant=True)
        # the whole forward again beside the output's gradient: (10 + 40 + 80) + 80, or the backward's first step
        # with the saved 10 and the output kept: 10 + 80 + 40 + 80
        assert total(memory.recompute) == 210

    def test_an_operation_that_saves_its_output_must_run(self):
        def peak(saves_output):
            tape = Tape()
            x = tape.input(constant(0), 1)
            a = tape.run([x], constant(10), 1, saves=[x])
            b = tape.run([a], constant(50), 1, saves=[a], saves_output=saves_output, temp=constant(1000))
            tape.run([b], constant(0), 1)
            return total(tape.play().recompute)

        assert peak(saves_output=True) == 50 + 10 + 50 + 1000
        assert peak(saves_output=False) == 10 + 50 + 10

    def test_a_weight_that_is_needed_starts_it_though_it_takes_no_room(self):
        def waiting(saves_weight):
            tape = Tape()
            x = tape.input(constant(0), 1)
            a = tape.run([x], constant(1), 1, saves=[x], temp=constant(1000))
            b = tape.run([a], constant(2), 1, saves=[a])
            c = tape.run([b], constant(4), 1)
            tape.run([c], constant(8), 1, saves_weight=saves_weight)
            return total(tape.play().recompute) - 1000

        # beside the first operation (1) and its temporary: the last output's gradient 8, or b's 2
        assert waiting(saves_weight=True) == 1 + 8
        assert waiting(saves_weight=False) == 1 + 2


sizes = st.tuples(*[st.integers(0, 1000)] * 4)
snapshots = st.lists(st.tuples(*[sizes] * 4), min_size=1, max_size=12)


def test_the_largest_candidate_depends_on_tokens_and_length():
    zero = constant(0)
    fixed, growing = (constant(100), zero, zero, zero), (zero, per_token(2), zero, zero)
    peaks = Peaks((fixed, growing))
    assert peaks.at(10, 1)["activations"] == 100
    assert peaks.at(100, 1)["logits"] == 200


@given(st.data())
def test_dropping_candidates_never_changes_a_peak(data):
    """A random chain of operations: the pruned peaks equal the maximum over every moment, replayed one by one."""
    count = data.draw(st.integers(1, 8))
    tape = Tape()
    tensors = [tape.input(data.draw(sizes), 1)]
    for _ in range(count):
        inputs = data.draw(st.lists(st.sampled_from(tensors), min_size=1, max_size=2, unique_by=id))
        saves = data.draw(st.lists(st.sampled_from(inputs), max_size=2, unique_by=id))
        tensors.append(tape.run(inputs, data.draw(sizes), 1, saves=saves, temp=data.draw(sizes)))
    tokens, seq_len = data.draw(st.integers(1, 100)), data.draw(st.integers(1, 100))
    memory = tape.play()
    highest = max(
        sum(evaluate(s, tokens, seq_len) for s in moment) for moment in tape._forward(keep_saved=True)[0]
    )
    assert total(memory.forward, tokens, seq_len) == highest
    assert total(memory.no_grad, tokens, seq_len) <= highest


def test_what_an_operation_saved_is_gone_before_its_weights_gradient_is_used():
    tape = Tape()
    x = tape.input(constant(1), 1)
    tape.run([x], constant(10), 1, saves_output=True, weight_grad=constant(100))
    # Output, its gradient and the weight's; then the input's gradient, the weight's and half as much again.
    assert total(tape.play().backward) == 10 + 10 + 1 + 100
    assert total(tape.play(step_factor=0.5).backward) == 1 + 100 + 50
