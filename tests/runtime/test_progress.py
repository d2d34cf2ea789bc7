"""Lines of progress: what they say, when they are printed, and what compilation adds to them."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from terminal import on_a_terminal

from camopd_jax.runtime import progress
from camopd_jax.runtime.progress import Compilations, Reporter, Work, current, work


def at(one, seconds):
    """The line after so many seconds."""
    return one.text(one.started + seconds)


def test_the_line_of_a_work():
    assert at(Work("rollout"), 0.5) == "rollout" and at(Work("rollout"), 12.4) == "rollout, 12 s"
    reading = Work("reading x.jsonl", unit="rows")
    reading.add(1_234_567)
    assert at(reading, 9) == "reading x.jsonl: 1,234,567 rows"
    weights = Work("loading student", 5 * 2**30, "GiB")
    assert at(weights, 3) == "loading student: 0.0 of 5.0 GiB"
    weights.add(2**30)
    assert at(weights, 30) == "loading student: 1.0 of 5.0 GiB, 0:02:00 left"  # four times as much is left
    weights.add(9 * 2**30)
    assert at(weights, 30) == "loading student: 5.0 of 5.0 GiB, 0:00:00 left"


def test_the_time_left_is_that_of_what_was_not_done_before():
    answering = Work("covered", 384, "questions")
    answering.start_with(192)
    answering.add(48)  # a quarter of the rest
    assert at(answering, 20) == "covered: 240 of 384 questions, 0:01:00 left"


def test_works_inside_each_other_are_one_line():
    with pytest.raises(KeyError), work("evaluating general"), work("covered", 3, "questions"):
        with work("compiling advance"):
            now = time.perf_counter() + 5
            assert current(now) == "evaluating general, 5 s · covered: 0 of 3 questions · compiling advance, 5 s"
        raise KeyError
    assert current(time.perf_counter() + 5) == ""


def test_plain_lines_come_after_three_seconds_and_then_every_ten():
    lines, began = [], time.perf_counter()
    reporter = Reporter(lines.append, in_place=False)
    with work("loading"):
        for tenth in range(400):
            reporter.turn(began + tenth / 10 + 0.05)
    seconds = [int(line.removeprefix("loading, ").removesuffix(" s")) for line in lines]
    np.testing.assert_allclose(seconds, [3, 13, 23, 33], atol=1)
    reporter.turn(began + 60)
    assert len(lines) == 4, "there is no work"


def test_no_plain_line_follows_another_output_at_once():
    lines = []
    reporter = Reporter(lines.append, in_place=False)
    with work("loading"):
        reporter.printed()
        now = time.perf_counter()
        reporter.turn(now + 2.9)
        assert not lines
        reporter.turn(now + 3.1)
        assert len(lines) == 1


def test_compiled_programs_are_counted_and_named():
    compilations, shown = Compilations(), []
    compilations.listen()

    @jax.jit
    def a_new_name(x):
        shown.append(current(time.perf_counter() + 5))  # while it is traced
        return jnp.sin(x) * 3

    try:
        argument = np.ones(7, np.float32)
        before = compilations.programs
        a_new_name(argument)
        assert compilations.programs - before == 1 and compilations.seconds > 0
        assert shown[0].startswith("compiling a_new_name (program ")
        a_new_name(argument)
        assert compilations.programs - before == 1, "it is compiled once"
        assert current(time.perf_counter() + 5) == ""
    finally:
        for unregister, listener in (
            (jax.monitoring.unregister_scalar_listener, compilations._begin),
            (jax.monitoring.unregister_event_duration_listener, compilations._end),
            (jax.monitoring.unregister_event_listener, compilations._event),
        ):
            unregister(listener)


def test_on_a_terminal_one_line_is_rewritten_and_gone_at_the_end():
    text = on_a_terminal("""
        import time
        from camopd_jax.runtime import progress
        progress.SHORT_SECONDS = 0
        progress.report()
        with progress.work("loading", 4, "rows") as loading:
            for _ in range(4):
                loading.add()
                time.sleep(0.3)
        progress.console().print("the end")
    """)
    assert "loading: 1 of 4 rows" in text and "\x1b[2K" in text
    end = text.rpartition("\x1b[2K")[2]
    assert "the end" in end and "loading" not in end and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert progress._reporter is None, "only commands show progress"
