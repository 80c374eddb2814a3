"""The live view: how far a round is, how fast it goes, how long it will take."""

from io import StringIO

from rich.console import Console

from intramural.server.screen import Screen


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def screen(clock: Clock) -> Screen:
    return Screen(Console(file=StringIO(), width=160), rounds=4, clock=clock)


def shown(of: Screen) -> tuple[float, str]:
    (task,) = of._progress.tasks
    return task.completed, task.fields["note"]


def test_rate_and_time_left_follow_from_the_answers_of_the_phase() -> None:
    clock = Clock()
    view = screen(clock)
    view.opened(2, ["a", "b", "c", "d"])
    assert shown(view) == (1, "round 2: training")
    clock.now_s += 2.0
    view.answered("a", "train", good=True, reason="")
    # one in two seconds; three are left
    assert shown(view) == (1.25, "training: 1 of 4 sites, 0.5 a second, 6 s left")
    clock.now_s += 1.0
    view.answered("b", "train", good=False, reason="refused")
    assert shown(view) == (1.5, "training: 2 of 4 sites, 0.7 a second, 3 s left")


def test_an_evaluation_is_timed_by_itself_and_moves_no_bar() -> None:
    clock = Clock()
    view = screen(clock)
    view.opened(1, ["a"])
    clock.now_s += 50.0
    view.answered("a", "train", good=True, reason="")
    view.evaluating(1, "validation", ["a", "b"])
    clock.now_s += 0.25
    view.answered("a", "evaluate", good=True, reason="")
    assert shown(view) == (1.0, "evaluating: 1 of 2 sites, 4.0 a second, 0 s left")


def test_a_thousand_answers_a_second_move_the_bar_ten_times_and_at_the_end() -> None:
    clock = Clock()
    view = screen(clock)
    view.opened(1, [str(n) for n in range(1000)])
    notes = []
    for number in range(1000):
        clock.now_s += 0.001
        view.answered(str(number), "train", good=True, reason="")
        notes.append(shown(view)[1])
    assert len(set(notes)) in (10, 11, 12)
    assert notes[-1] == "training: 1000 of 1000 sites, 1000 a second, 0 s left"
