"""Every master: the solution has full marks, the stub none, and each mistake loses what the rubric says."""

import functools
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "course"))
from masters import parser, read, sources  # noqa: E402

SEEDS = ("one secret", "another secret")
EXAMPLE = re.search(r"`````markdown\n(.*?)`````", (ROOT / "course" / "README.md").read_text(), re.DOTALL)[1]


@pytest.fixture(scope="module", autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    path = tmp_path_factory.mktemp("master") / "a0_means.md"
    path.write_text(EXAMPLE)
    return path


@functools.cache
def load(source):
    return read(source)


def assert_sound(assignment, name):
    """Raise AssertionError unless everything in an exercise scores as its master says."""
    exercise, setup, answers = assignment.exercises[name], assignment.setup, assignment.setup
    for other in assignment.exercises.values():  # later answers and mistakes may call solutions
        parser.define(other.solution.source, answers, other.name)

    def marks(source, function, seed):
        namespace = dict(answers)
        parser.define(source, namespace, function)
        verdicts = parser.judge(exercise, namespace[function], setup, seed)
        return {check for check, wrong in verdicts.items() if wrong is None}

    everything = {check.name for check in exercise.hidden}
    for check in (exercise.check.source, *(check.source for check in exercise.hidden)):
        assert not parser.private_names(check)
    for seed in SEEDS:
        assert marks(exercise.solution.source, f"{exercise.name}_solution", seed) == everything
        assert marks(exercise.stub.source, exercise.name, seed) == set()
        for mistake in exercise.mistakes:
            lost = everything - marks(mistake.source, mistake.name, seed)
            assert lost == set(mistake.loses), mistake.name


def assert_visible_check(assignment, name):
    exercise, namespace = assignment.exercises[name], assignment.setup
    for other in assignment.exercises.values():
        parser.define(other.solution.source, namespace, other.name)
    for cell in (exercise.stub, exercise.check):
        parser.define(cell.source, namespace, exercise.name)
    check = namespace[f"check_{exercise.name}"]
    check(namespace[f"{exercise.name}_solution"])
    with pytest.raises(Exception):  # noqa: B017  a stub may fail in any way
        check(namespace[exercise.name])


CASES = [pytest.param(s, n, id=f"{s.stem}-{n}") for s in sources() for n in read(s).exercises]


@pytest.mark.parametrize(("source", "name"), CASES)
def test_marks_are_what_the_master_says(source, name):
    assert_visible_check(load(source), name)
    assert_sound(load(source), name)


@pytest.mark.parametrize("source", sources(), ids=lambda s: s.stem)
def test_a_master_is_complete(source):
    assignment = read(source)
    text = "\n".join(c.source for c in assignment.notebook.cells if c.cell_type == "markdown")
    head = r"^\*(★{1,3}) (?:easy|medium|hard)\. About (\d+) hours.*Measured: ([\d.]+) minutes, [\d.]+ GB"
    stars, hours, minutes = re.search(head, text, re.MULTILINE).groups()
    row = rf"^\| {source.stem[1]} \|.*\| {hours} h \| {stars} \| {minutes} minutes"
    assert re.search(row, (ROOT / "course" / "GUIDE.md").read_text(), re.MULTILINE)
    assert "After this assignment you can" in text and "You need" in text
    assert text.count("{admonition} Hint") >= len(assignment.exercises)
    assert assignment.write_ups
    assert sum(len(e.mistakes) for e in assignment.exercises.values()) >= 3


@pytest.mark.parametrize(("source", "name"), CASES)
def test_another_seed_asks_for_other_things(source, name):
    assignment = load(source)
    asked = {}
    for seed in (*SEEDS, SEEDS[0]):
        namespace, calls = assignment.setup, []
        for other in assignment.exercises.values():
            parser.define(other.solution.source, namespace, name)
        solution = namespace[f"{name}_solution"]

        def note(x, calls=calls):
            """Data as they are; of a function, what it returns.  The first few tell."""
            if not callable(x):
                if len(calls) < 20:
                    calls.append(repr(x))
                return x
            return lambda *args, **kwargs: note(x(*args, **kwargs), calls)

        def answer(*args, solution=solution, note=note, **kwargs):
            return solution(*map(note, args), **{key: note(x) for key, x in kwargs.items()})

        parser.judge(assignment.exercises[name], answer, assignment.setup, seed)
        assert asked.setdefault(seed, calls) == calls
    one, other = asked.values()
    assert one != other or not one  # a hand-in is asked for nothing


def handout_function(stem, name):
    """A function that the cells for students define, beside those of `exercise-setup`."""
    assignment = load(next(s for s in sources() if s.stem == stem))
    namespace = assignment.setup
    cell = next(c for c in assignment.notebook.cells if c.source.startswith(f"def {name}("))
    parser.define(cell.source.split("\n\n\n")[0], namespace, name)
    return namespace[name]


def test_the_table_of_open_questions_is_what_the_named_records_say(tmp_path):
    claim = handout_function("a6_capstone", "claim")
    text = next(s for s in sources() if s.stem == "a6_capstone").read_text()
    for arms, seeds, said in (
        ((("rule110-rival-state-8e-3", 1), ("rule110-rival-state-4e-3", 4)), (3, 4, 5), "was 0.38 ± 0.17"),
        ((("rule110-ablation-hebbian", 1), ("rule110-ablation-hebbian", 4)), (0, 1, 2), "is 0.16 ± 0.32"),
        ((("rule110-truncate-1", 4), ("rule110-quick", 4)), (0, 1, 2), "lost 0.15 ± 0.10"),
    ):
        found = claim("", *arms, seeds=seeds)
        assert said in text and said.endswith(f"{found['mean']:.2f} ± {found['half']:.2f}")
        assert all(f"`{preset}`" in text for preset, _ in arms)
        assert claim("", *arms, seeds=seeds, folder=tmp_path) == found  # no record of one's own
    with pytest.raises(AssertionError, match=r"no finished run of .*-4e-3 at N = 1 on seeds \[3\]"):
        claim("", ("rule110-rival-state-4e-3", 1), seeds=(0, 3))


def test_names_are_unique_over_all_assignments():
    names = [name for source in sources() for name in read(source).exercises]
    assert len(names) == len(set(names))


def test_the_example_of_the_page_is_sound(example):
    assignment = read(example)
    for name in assignment.exercises:
        assert_visible_check(assignment, name)
        assert_sound(assignment, name)
    assert assignment.points == 4 and assignment.write_ups["why"].points == 4


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return (x / len(x)).sum(0)", "return x.mean(0) + 1"),
        ("return np.zeros(x.shape[1])", "return x.mean(0)"),
        ("return x.mean(0)", "return (x / len(x)).sum(0)"),
        ("assert np.allclose(got, x.mean(0))", "assert np.isfinite(got).all()"),
        ("assert np.allclose(answer(x) / 1e308, 1)", "assert answer(x)._private == 1"),
    ],
    ids=["wrong solution", "a stub that scores", "a harmless mistake", "a weak check", "a private name"],
)
def test_an_unsound_master_is_caught(tmp_path, old, new):
    assert EXAMPLE.count(old) == 1
    path = tmp_path / "a0_bad.md"
    path.write_text(EXAMPLE.replace(old, new))
    assignment = read(path)
    with pytest.raises(AssertionError):
        assert_sound(assignment, "mean_row")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  memory: 512\n", "", "course: wants exactly"),
        (":points: 3\n", "", "hidden_mean_row_values: needs"),
        ('    """No overflow."""\n', "", "hidden_mean_row_large: needs"),
        ("[hidden_mean_row_large]", "[hidden_mean_row]", "mean_row_mistake_overflow: loses"),
        ("exercise-solution", "exercise-hidden", "no exercise-solution"),
        ("exercise-check", "exercise-test", "no exercise-check"),
        ('+++ {"tags": ["instructor"]}\n', "", "public or not"),
        ('["writeup-rubric"]', '["writeup-prompt"]', "writeup-prompt of why"),
        ('["instructor"]', '["instructor-only"]', "unknown tag instructor-only"),
    ],
)
def test_a_malformed_master_is_refused(tmp_path, old, new, message):
    path = tmp_path / "a0_bad.md"
    path.write_text(EXAMPLE.replace(old, new))
    with pytest.raises(ValueError, match=f"a0_bad.md: .*{message}"):
        read(path)


def test_students_see_the_public_cells_only(example):
    text = "\n".join(cell.source for cell in parser.public_cells(read(example).notebook))
    assert "def mean_row(x)" in text and "def check_mean_row" in text and "median" not in text
    for private in ("hidden_mean_row", "mean_row_solution", "mean_row_mistake", "Most will"):
        assert private not in text
    assert "When does the mean mislead" in text and "an example with numbers" in text
