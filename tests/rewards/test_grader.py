import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from laser_fast.config import ConfigError, RewardConfig
from laser_fast.rewards import Grader, RewardError, grade
from laser_fast.rewards.pool import Failure
from laser_fast.rewards.user import check_rewards
from laser_fast.stopping import POLL_S

# Neither sympy nor a signal handler gets a word in: the power is one call into C.
HANG = r"\boxed{9^{9^{9^{9}}}}"

USER_MODULE = """
import ctypes, os, signal, sys, time
from pathlib import Path

def equal(completions, answers):
    return [float(c == a) for c, a in zip(completions, answers)]

def eventful(completions, answers):
    for completion in completions:
        if completion == "hang": ctypes.PyDLL(None).sleep(1000)  # in C, and nobody gets the GIL
        if completion.startswith("/"):
            Path(completion, "begun").touch()
            while not Path(completion, "go on").exists(): time.sleep(0.01)
        if completion == "exit": os._exit(0)
        if completion == "segfault": os.kill(os.getpid(), signal.SIGSEGV)
        if completion == "raise": raise KeyError("user's own")
        if completion == "sys.exit": sys.exit(0)
        if completion == "none": return [None] * len(completions)
    return [float(len(completions))] * len(completions)

def short(completions, answers):
    return [1.0]

def modules(completions, answers):
    heavy = {"torch", "pydantic", "sympy", "transformers"} & set(sys.modules)
    return [float(len(heavy))] * len(completions)

def sleepy(completions, answers):
    time.sleep(0.4 * len(completions))
    return [1.0] * len(completions)

def slow_trl(prompts, completions, answer, **kwargs):
    time.sleep(2.0 if len(prompts) > 1 else 0.0)
    return [float(p + c == a) for p, c, a in zip(prompts, completions, answer)]

def as_trl(prompts, completions, **kwargs):
    assert kwargs["answer"] == kwargs["answers"]
    return [float(p + c == a) for p, c, a in zip(prompts, completions, kwargs["answer"])]

def by_name(answers, completions):
    return [float(c == a) for c, a in zip(completions, answers)]

async def judge(completions, level, tags):
    import asyncio
    await asyncio.gather(*(asyncio.sleep(0) for _ in completions))
    return [float(len(c) == n) + len(t) for c, n, t in zip(completions, level, tags)]

def optional(completions, prompts=None, threshold=0.5):
    return [0.0 if prompts is None else 1.0] * len(completions)

def number(completions):
    return [float(completion) for completion in completions]

def other_names(texts, golds):
    return [1.0] * len(texts)

def of_one(completion, answer):
    return 1.0

def nothing():
    return []

def by_place(completions, answers, /):
    return []

def hash_seed(completions, answers):
    return [hash("seed") % 1000] * len(completions)

def pid(completions, answers):
    return [os.getpid()] * len(completions)

not_a_function = 3
"""


@pytest.fixture(scope="module")
def user_module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "my_rewards.py").write_text(USER_MODULE)
    (folder / "broken_rewards.py").write_text("import not_installed_anywhere\n")
    slow = f"import time\ntime.sleep({POLL_S} + 0.5)\nimport not_installed_anywhere\n"
    (folder / "slowly_broken_rewards.py").write_text(slow)
    sys.path.insert(0, str(folder))
    yield "my_rewards"
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def math_grader():
    with Grader(RewardConfig(kind="math", timeout_s=1.5, workers=2)) as grader:
        yield grader


def test_a_hanging_answer_is_wrong_within_its_deadline_and_alone(math_grader):
    texts = [r"\boxed{4}", HANG, r"\boxed{\frac{8}{2}}", HANG, r"\boxed{5}", "none"] * 2
    math_grader.grade([r"\boxed{\frac{1}{2}}"] * 4, ["0.5"] * 4)  # warm: both workers have started
    # That it returns at all is the deadline: four hangs on two workers, and their restarts.
    assert math_grader.grade(texts, ["4"] * 12) == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0] * 2
    assert math_grader.grade([r"\boxed{4}"], [4]) == [1.0]


def test_the_side_that_breaks_the_grader_is_to_blame(math_grader):
    assert math_grader.grade([r"\boxed{10^{9000000}}"], ["44"]) == [0.0]
    assert math_grader.grade([r"\boxed{5}", r"\boxed{\pi}"], [HANG[7:-1], "1/0"]) == [None, None]


def test_a_worker_killed_from_outside_costs_no_grade(math_grader):
    math_grader.grade([r"\boxed{4}"] * 4, ["4"] * 4)
    started = [worker for worker in math_grader._pool._workers if worker.call is None]
    assert started
    for worker in started:
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
    assert math_grader.grade([r"\boxed{4.0}"] * 4, ["4"] * 4) == [1.0] * 4


def test_an_answer_whose_worker_was_killed_is_graded_again(math_grader, monkeypatch):
    run, lost = math_grader._run, [Failure("crash", "killed"), Failure("deadline", "stopped")]

    def losing(function, calls):
        outcomes = run(function, calls)
        while lost:
            outcomes[len(lost)] = lost.pop()
        return outcomes

    monkeypatch.setattr(math_grader, "_run", losing)
    texts = [r"\boxed{4}", r"\boxed{4.0}", r"\boxed{5}"]
    assert math_grader.grade(texts, ["4"] * 3) == [1.0, 1.0, 0.0]


def test_an_interrupted_call_leaves_no_reply_behind(user_module, tmp_path):
    class Interrupt(BaseException):
        pass

    def interrupt(signal_number, frame):
        raise Interrupt

    def interrupt_once_begun():
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    config = RewardConfig(kind=f"{user_module}:eventful", timeout_s=60.0, workers=1)
    previous = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with Grader(config) as grader:
            thread = threading.Thread(target=interrupt_once_begun, daemon=True)
            with pytest.raises(Interrupt):
                thread.start()
                grader.grade([str(tmp_path), "a"], ["", ""])
            thread.join()
            (tmp_path / "go on").touch()
            time.sleep(0.3)  # by now the interrupted call would have replied with two rewards
            assert grader.grade(["a"], [""]) == [1.0]
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_an_unreadable_gold_is_none_and_logged(math_grader, caplog):
    assert math_grader.grade([r"\boxed{4}"] * 2, ["", "4"]) == [None, 1.0]
    assert '1 of 2 grades by "math" failed: ValueError: math-verify finds no answer' in caplog.text


def test_same_answer_has_a_deadline(math_grader):
    assert math_grader.same_answer("0.5", r"\frac{1}{2}")
    assert not math_grader.same_answer("0.5", "2")
    assert not math_grader.same_answer(HANG[7:-1], "5")
    assert math_grader.same_answer(HANG[7:-1], HANG[7:-1] + " ")
    assert math_grader.same_answer(r" \frac{", r"\frac{ ")


def test_wrong_lengths_are_refused(math_grader):
    with pytest.raises(ValueError, match="the 2 texts, got 1"):
        math_grader.grade(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="the 1 texts, got 1 and 2"):
        math_grader.grade(["a"], ["a"], prompts=["p", "q"])
    assert math_grader.grade([], []) == []


def test_format_gate():
    twice = r"\boxed{4} \boxed{4}"
    tagged = r"x </think> <answer> \boxed{4} </answer>"
    prompts = ["", "", "Use <answer> </answer>.", "Use <answer> </answer>."]
    with Grader(RewardConfig(format_gate=True, workers=1)) as grader:
        texts = [r"\boxed{4}", twice, tagged, r"\boxed{4}"]
        assert grader.grade(texts, ["4"] * 4, prompts=prompts) == [1.0, 0.0, 1.0, 0.0]
        assert grader.grade(texts, ["4"] * 4) == [1.0, 0.0, 1.0, 1.0]


def test_user_function_gets_the_batch(user_module):
    with Grader(RewardConfig(kind=f"{user_module}:equal")) as grader:
        assert grader.grade(["1", "2", "3"], ["1", 2, "4"]) == [1.0, 1.0, 0.0]
    with Grader(RewardConfig(kind=f"{user_module}:short")) as grader:
        assert grader.grade([], []) == []  # never called with nothing
    with Grader(RewardConfig(kind=f"{user_module}:eventful")) as grader:
        assert grader.grade(["a", "b", "c"], ["", "", ""]) == [3.0, 3.0, 3.0]
        assert grader.grade(["a", "none", "c"], ["", "", ""]) == [None, None, None]


@pytest.mark.parametrize("event", ["hang", "exit", "segfault"])
def test_a_lost_user_call_costs_only_the_guilty_answer(user_module, event, caplog):
    config = RewardConfig(kind=f"{user_module}:eventful", timeout_s=2.0, batch_timeout_s=2.0)
    with Grader(config) as grader:
        rewards = grader.grade(["a", event, "b"], ["", "", ""])
        assert rewards == [1.0, None, 1.0]  # 1.0: each in a call of its own
        assert grader.grade(["a", "b"], ["", ""]) == [2.0, 2.0]
        assert grader.grade([event], [""]) == [None]
    assert "calling it with one at a time" in caplog.text


def test_a_batch_has_a_deadline_of_its_own(user_module, caplog):
    with Grader(RewardConfig(kind=f"{user_module}:sleepy", timeout_s=1.0)) as grader:
        assert grader.grade(["a"] * 4, [""] * 4) == [1.0] * 4
    assert not caplog.text
    config = RewardConfig(kind=f"{user_module}:sleepy", timeout_s=1.0, batch_timeout_s=1.0)
    with Grader(config) as grader:
        assert grader.grade(["a"] * 4, [""] * 4) == [1.0] * 4
    assert "raise reward.batch_timeout_s = 1" in caplog.text


def test_a_user_function_gets_what_it_asks_for_by_name(user_module):
    texts, answers, prompts = ["5", "6"], ["25", "27"], ["2", "2"]
    with Grader(RewardConfig(kind=f"{user_module}:as_trl")) as grader:
        assert grader.grade(texts, answers, prompts=prompts) == [1.0, 0.0]
        with pytest.raises(RewardError, match='my_rewards:as_trl" asks for prompts, but here'):
            grader.grade(texts, answers)
    with Grader(RewardConfig(kind=f"{user_module}:by_name")) as grader:
        assert grader.grade(texts, ["5", "7"]) == [1.0, 0.0]
    with Grader(RewardConfig(kind=f"{user_module}:optional")) as grader:
        assert grader.grade(texts, answers) == [0.0, 0.0]
        assert grader.grade(texts, answers, prompts=prompts) == [1.0, 1.0]


def test_a_user_function_gets_fields_of_the_data_and_may_be_async(user_module):
    with Grader(RewardConfig(kind=f"{user_module}:judge")) as grader:
        assert grader.fields == ("level", "tags")
        fields = ['{"level": 1, "tags": []}', '{"level": 3, "tags": ["a", "b"]}']
        assert grader.grade(["5", "66"], ["", ""], fields=fields) == [1.0, 2.0]
        said = 'my_rewards:judge" asks for level, tags, but here are only completions, answers, ans'
        with pytest.raises(RewardError, match=f"{said}wer; train and eval give it .* fields of"):
            grader.grade(["5"], [""])
    with Grader(RewardConfig(kind=f"{user_module}:optional")) as grader:
        assert grader.fields == ()


def test_prompts_also_come_with_single_calls(user_module):
    config = RewardConfig(kind=f"{user_module}:slow_trl", timeout_s=60.0, batch_timeout_s=1.0)
    with Grader(config) as grader:
        assert grader.grade(["5", "6"], ["25", "26"], prompts=["2", "3"]) == [1.0, 0.0]


def test_rewards_are_mapped_from_their_range_and_refused_outside(user_module):
    kind = f"{user_module}:number"
    with Grader(RewardConfig(kind=kind)) as grader:  # no score trains
        assert grader.grade(["10", "-1"], ["", ""]) == [10.0, -1.0]
    for config, texts, fault in (
        (RewardConfig(kind=kind), ["1.0000000001"], r"got 1.0000000001, but"),
        (RewardConfig(kind=kind), ["0.5", "1.5"], r"got 1.5, but .* rewards from 0 to 1; set rew"),
        (RewardConfig(kind=kind), ["-1"], "got -1, but .* from 0 to 1"),
        (RewardConfig(kind=kind, range=(-1.0, 3.0)), ["3.5"], "got 3.5, but .* from -1 to 3"),
    ):
        with Grader(config, trains_score=True) as grader:
            with pytest.raises(RewardError, match=f'my_rewards:number": {fault}'):
                grader.grade(texts, [""] * len(texts))
            assert grader.grade(["0", "1"], ["", ""])[0] >= 0.0
    with Grader(RewardConfig(kind=kind, range=(-1.0, 3.0))) as grader:
        assert grader.grade(["-1", "0", "3"], [""] * 3) == [0.0, 0.25, 1.0]


@pytest.mark.parametrize(
    ("function", "texts", "message"),
    [
        ("eventful", ["a", "raise"], r'my_rewards:eventful" raised KeyError: .*\n.*my_rewards.py'),
        ("eventful", ["a", "sys.exit"], 'my_rewards:eventful" raised SystemExit'),
        ("short", ["a", "b"], 'my_rewards:short": got 1 rewards for 2 completions'),
    ],
)
def test_a_broken_user_function_stops_with_its_name(user_module, function, texts, message):
    with Grader(RewardConfig(kind=f"{user_module}:{function}")) as grader:
        with pytest.raises(RewardError, match=f"(?s){message}"):
            grader.grade(texts, [""] * 2)
        # The worker is still good for the next call.
        assert grader.grade(["a"], [""]) == [1.0]


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([1.0, float("nan")], "reward 1: expected a finite number, got nan"),
        ([float("inf"), 0.0], "reward 0: expected a finite number, got inf"),
        ([0.0, "1"], "reward 1: expected a number, got str '1'"),
        ([0.0, [1.0]], "reward 1: expected a number, got list"),
        ([0.0, 1j], "reward 1: expected a number, got complex"),
        (1.0, "expected a list of 2 numbers, got float 1.0"),
        ("10", "expected a list of 2 numbers, got str"),
        ({0: 1.0, 1: 1.0}, "expected a list of 2 numbers, got dict"),
        (None, "expected a list of 2 numbers, got NoneType"),
        ([1.0], "got 1 rewards for 2 completions"),
        ([1.0] * 4, "got 4 rewards for 2 completions"),
    ],
)
def test_what_a_user_function_may_not_return(rewards, message):
    with pytest.raises(RewardError, match="(?s)" + 'reward function "m:f".*' + message):
        check_rewards(rewards, 2, kind="m:f")


def test_what_a_user_function_may_return():
    numpy = pytest.importorskip("numpy")
    for rewards in ([1, True, None], (1.0, 1.0, None), (x for x in (1, 1, None))):
        assert check_rewards(rewards, 3, kind="m:f") == [1.0, 1.0, None]
    rewards = check_rewards(numpy.array([0.5, 1.0], dtype="float32"), 2, kind="m:f")
    assert rewards == [0.5, 1.0]
    assert all(type(reward) is float for reward in rewards)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("maths", 'expected math, gsm8k, exact, sandbox or "module:function"; did you mean "math"'),
        ("my_rewards", 'expected math, gsm8k, exact, sandbox or "module:function"'),
        (":f", 'expected math, gsm8k, exact, sandbox or "module:function"'),
        ("no_such_module:f", "cannot be loaded: ModuleNotFoundError: .*no_such_module"),
        ("broken_rewards:f", "cannot be loaded: ModuleNotFoundError: .*not_installed_anywhere"),
        ("slowly_broken_rewards:f", "cannot be loaded: ModuleNotFoundError"),
        ("my_rewards:missing", "cannot be loaded: AttributeError: .*missing"),
        ("my_rewards:other_names", "it asks for texts, golds; a reward function gets completions"),
        ("my_rewards:of_one", "it asks for completion; .* among prompts, completions, answers"),
        ("my_rewards:nothing", "it asks for nothing; a reward function gets completions"),
        ("my_rewards:by_place", "it asks for completions, answers; .* by name"),
        ("my_rewards:not_a_function", "cannot be loaded: TypeError: .*int, not a function"),
    ],
)
def test_an_unknown_kind_is_refused_at_once(user_module, kind, message):
    with pytest.raises(ConfigError, match=f'reward.kind = "{kind}".*{message}'):
        Grader(RewardConfig(kind=kind))


def test_the_format_gate_belongs_to_math():
    with pytest.raises(ConfigError, match="format_gate = true works only with"):
        Grader(RewardConfig(kind="exact", format_gate=True))


def test_workers_load_only_what_they_need_and_hash_alike(user_module):
    import torch  # noqa: F401 - heavy in the parent, absent in the worker

    assert grade(f"{user_module}:modules", "", "") == 0.0
    with Grader(RewardConfig(kind=f"{user_module}:hash_seed")) as grader:
        [seed] = grader.grade([""], [""])
    assert grade(f"{user_module}:hash_seed", "", "") == seed


def test_grade_keeps_its_worker(user_module):
    kind = f"{user_module}:pid"
    assert grade(kind, "", "") == grade(kind, "", "")
    assert grade("exact", "a", "a") == 1.0
    assert grade("gsm8k", "so 5", "#### 6") == 0.0
    assert grade("sandbox", r"2+3=5\boxed{5}", "5") == 1.0


def test_a_script_without_main_guard_can_grade_and_leaves_no_worker(tmp_path, user_module):
    script = tmp_path / "script.py"
    script.write_text(
        "from laser_fast.rewards import grade\n"
        f"import sys; sys.path.insert(0, {str(sys.path[0])!r})\n"
        f"print(int(grade('{user_module}:pid', '', '')))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_a_closed_grader_refuses(user_module):
    grader = Grader(RewardConfig(kind=f"{user_module}:equal"))
    grader.close()
    grader.close()
    with pytest.raises(RuntimeError, match="closed"):
        grader.grade(["a"], ["a"])
