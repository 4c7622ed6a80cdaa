"""dop-search as a model of lmms-eval, and score_suite on the bundled model."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pytest
from PIL import Image
from support.answers import answer_questions

from dop_search.data.benchmarks import benchmark_rows
from dop_search.data.benchmarks import rows as rendered
from dop_search.data.samples import Sample
from dop_search.evaluation.lmms.answering import Generation, Prompt, answer_prompts, part
from dop_search.evaluation.lmms.tasks import write_tasks
from dop_search.evaluation.suite_scores import score_suite
from dop_search.evaluation.suites import load_suite, make_suite
from dop_search.strategy import Strategy
from dop_search.utils.errors import CacheError, DataError, DopError

STRATEGY = Strategy.depthwise(num_layers=12, q=8, kv=10, mlp=4, num_visual_tokens=72)
GREEDY = {"max_new_tokens": 8, "do_sample": False, "temperature": 0, "until": ["\n\n"]}


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory):
    """A work_dir with 6 rows per benchmark, and the suite that reads them."""
    folder = tmp_path_factory.mktemp("work")
    suite = make_suite("few", ["gqa", "mme", "scienceqa"], source="rendered", judge=False, max_new_tokens=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rendered, "NUM_ROWS", 6)
        write_tasks(suite, folder / "tasks", folder / "data")
        yield folder, suite


@pytest.fixture(scope="module")
def dop(pocket):
    from dop_search.evaluation.lmms.model import DopChatLmms, DopLmms

    return SimpleNamespace(simple=DopLmms, chat=DopChatLmms, loaded=pocket)


def _requests(model, rows, options=GREEDY, chat=False):
    """Requests as lmms-eval makes them, on two tasks in turn."""
    model.task_dict = {"a": {"test": rows}, "b": {"test": rows}}
    text = "\nAnswer the question using a single word or phrase."

    def visual(row):
        return [row["image"]]

    def messages(row):
        content = [{"type": "image", "url": row["image"]}, {"type": "text", "text": row["question"] + text}]
        return [{"role": "user", "content": content}]

    requests = []
    for index, row in enumerate(rows):
        name = "ab"[index % 2]
        context = row["question"] + text
        args = (
            (context, messages, options, index, name, "test")
            if chat
            else (context, options, visual, index, name, "test")
        )
        requests.append(SimpleNamespace(args=args))
    return requests


def test_answers_come_in_order_whatever_the_batches(dop):
    rows = benchmark_rows("vqav2", 6)
    samples = [
        Sample(str(i), r["image"], r["question"] + "\nAnswer the question using a single word or phrase.", ("x",), "f")
        for i, r in enumerate(rows)
    ]
    expected = answer_questions(dop.loaded, samples, STRATEGY, batch_size=1, max_new_tokens=8)
    for kind, batch_size in ((dop.simple, 4), (dop.chat, 16)):
        model = kind(loaded=dop.loaded, strategy=STRATEGY, batch_size=batch_size)
        assert model.generate_until(_requests(model, rows, chat=kind is dop.chat)) == expected
    assert len(set(expected)) >= 3


def test_cleaning_leaves_the_model_and_nothing_stays_pruned(dop):
    model = dop.simple(loaded=dop.loaded, strategy=STRATEGY, batch_size=4)
    rows = benchmark_rows("pope", 4)
    before = model.generate_until(_requests(model, rows))
    model.clean()
    assert model.generate_until(_requests(model, rows)) == before
    assert "forward" not in vars(dop.loaded.adapter.text_model)


def test_an_error_in_one_sample_is_raised_and_the_model_restored(dop):
    model = dop.simple(loaded=dop.loaded, strategy=STRATEGY, batch_size=2)
    rows = [dict(row) for row in benchmark_rows("pope", 4)]
    del rows[3]["image"]
    with pytest.raises(KeyError, match="image"):
        model.generate_until(_requests(model, rows))
    assert "forward" not in vars(dop.loaded.adapter.text_model)


def test_generation_arguments(dop):
    model = dop.simple(loaded=dop.loaded)
    assert model._generation({"until": ["ASSISTANT:"]}) == Generation(128, ("ASSISTANT:",), (("do_sample", False),))
    assert model._generation(GREEDY | {"num_beams": 2}).options == (("do_sample", False), ("num_beams", 2))
    sampled = model._generation({"do_sample": True, "temperature": 0.5, "image_aspect_ratio": "original"})
    assert sampled.options == (("do_sample", True), ("temperature", 0.5))
    assert model._generation({"max_new_tokens": 5, "until": "x"}) == Generation(5, ("x",))


def test_answers_end_before_a_stop_string(dop):
    rows = benchmark_rows("textvqa", 1)
    model = dop.simple(loaded=dop.loaded)
    (whole,) = model.generate_until(_requests(model, rows))
    stop = whole[1]
    (cut,) = model.generate_until(_requests(model, rows, GREEDY | {"until": [stop]}))
    assert cut == whole.split(stop)[0] != whole


def test_prompts_without_and_with_several_images_share_no_batch(dop):
    image = benchmark_rows("pope", 1)[0]["image"]
    generation = Generation(4)
    prompts = [
        Prompt.of_user([*[part("image", image)] * number, part("text", f"Question {number}?")], generation)
        for number in (1, 0, 2, 1)
    ]
    together = answer_prompts(dop.loaded, [lambda p=p: p for p in prompts], STRATEGY, batch_size=4)
    alone = [answer_prompts(dop.loaded, [lambda p=p: p], STRATEGY)[0] for p in prompts]
    assert together == alone


def test_videos_need_a_processor_that_takes_them(dop):
    prompt = Prompt.of_user([part("video", "clip.mp4"), part("text", "What happens?")], Generation(4))
    with pytest.raises(DataError, match=r"the processor of 'pocket' \(LlavaProcessor\) takes no videos"):
        answer_prompts(dop.loaded, [lambda: prompt])


def test_what_a_task_gives_becomes_images_and_videos(tmp_path):
    from dop_search.evaluation.lmms.model import _flat, _media

    grey = Image.new("L", (3, 2))
    assert _media(grey)["image"].mode == "RGB"
    grey.save(tmp_path / "a.png")
    assert _media(str(tmp_path / "a.png"))["image"].size == (3, 2)
    assert _media("/videos/a.mp4") == part("video", "/videos/a.mp4")
    assert _flat([[1], [2, [3]]]) == [1, 2, 3]
    assert _flat(None) == []
    with pytest.raises(DataError, match="audio"):
        _media("a.wav", kind="audio")


def test_model_arguments(dop, tmp_path):
    path = tmp_path / "strategy.json"
    STRATEGY.save(path)
    text = f"pretrained=pocket,strategy={path},selector=uniform_grid,dtype=float32,device=cpu,batch_size=4"
    model = dop.simple.create_from_arg_string(text, {"batch_size": "1", "max_batch_size": None, "device": None})
    assert model.batch_size == 4
    assert (model.strategy.selector, model.strategy.groups) == ("uniform_grid", STRATEGY.groups)
    assert dop.simple.create_from_arg_string(f"pretrained=pocket,delta={path}", {}).strategy == STRATEGY
    with pytest.raises(DopError, match="`strategy` and `delta` are the same"):
        dop.simple(loaded=dop.loaded, strategy=str(path), delta=str(path))
    with pytest.raises(DopError, match="needs a strategy"):
        dop.simple(loaded=dop.loaded, selector="random")
    with pytest.raises(DopError, match="`imports` names 'my_missing', which cannot be imported"):
        dop.simple.create_from_arg_string("pretrained=pocket,imports=os.path:my_missing", {})
    with pytest.raises(TypeError, match="stratgy"):
        dop.simple.create_from_arg_string("stratgy=x", {})


@pytest.mark.slow
def test_score_suite_measures_once_quietly_and_the_strategy_matters(pocket, few_rows, capfd, monkeypatch, tmp_path):
    work_dir, suite = few_rows
    monkeypatch.chdir(tmp_path)
    heard = []
    full = score_suite(pocket, suite, work_dir=work_dir, on_progress=lambda *args: heard.append(args))
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())
    assert heard[0] == (0, 6, "GQA")
    assert heard[-1] == (6, 6, "ScienceQA-IMG")
    assert full.scores["gqa"].score >= 75
    poor = Strategy.depthwise(num_layers=12, q=1, kv=1, mlp=0, num_visual_tokens=2)
    pruned = score_suite(pocket, suite, poor, work_dir=work_dir)
    assert pruned.scores["gqa"].score < full.scores["gqa"].score
    assert pruned.fingerprint != full.fingerprint

    def fail(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr("dop_search.evaluation.lmms.run.run_benchmark", fail)
    assert score_suite(pocket, suite, work_dir=work_dir) == full
    assert score_suite(pocket, suite, Strategy.full(12), work_dir=work_dir) == full
    with pytest.raises(AssertionError, match="measured again"):
        score_suite(pocket, suite, work_dir=work_dir, resume=False)
    with pytest.raises(AssertionError, match="measured again"):
        score_suite(pocket, suite, work_dir=work_dir, limit=4)
    next((work_dir / "scores").glob("*/gqa.parquet")).write_bytes(b"broken")
    with pytest.raises(CacheError, match="corrupt"):
        [score_suite(pocket, suite, s, work_dir=work_dir) for s in (None, poor)]


def test_an_interrupted_suite_goes_on_where_it_stopped(pocket, few_rows, monkeypatch, tmp_path):
    from dop_search.evaluation.lmms import run

    _, suite = few_rows
    measure, measured = run.run_benchmark, []

    def once(model, suite, benchmark, manager):
        if measured == ["gqa"]:
            raise KeyboardInterrupt
        measured.append(benchmark.name)
        return measure(model, suite, benchmark, manager)

    monkeypatch.setattr(run, "run_benchmark", once)
    with pytest.raises(KeyboardInterrupt):
        score_suite(pocket, suite, work_dir=tmp_path, limit=2)
    measured.append("stopped")
    score_suite(pocket, suite, work_dir=tmp_path, limit=2)
    assert measured == ["gqa", "stopped", "mme", "scienceqa"]


def command_line(folder, few_rows):
    """The arguments of lmms-eval's own command, to be run in ``folder``."""
    work_dir, suite = few_rows
    STRATEGY.save(folder / "strategy-0.3.json")
    return [
        *("--model", "dop", "--batch_size", "4", "--include_path", str(work_dir / "tasks" / suite.name)),
        *("--tasks", suite.name, "--log_samples", "--output_path", "out"),
        *("--model_args", "pretrained=pocket,delta=strategy-0.3.json,device=cpu"),
    ]


def what_it_left(folder, stderr):
    """Results, answers by task and row, and what its bars have shown."""
    files = list(folder.glob("out/strategy-0.3.json/*_results.json"))
    assert len(files) == 1, stderr[-4000:]
    said = []
    for file in files[0].parent.glob("*_samples_*.jsonl"):
        task = file.stem.split("_samples_")[1]
        said += [(task, row["doc_id"], row["filtered_resps"]) for row in map(json.loads, file.read_text().splitlines())]
    shown = set(re.findall(r"Model Responding: 100%.*? (\d+)/(\d+) ", stderr))
    return json.loads(files[0].read_text())["results"], sorted(said), shown


@pytest.fixture(scope="module")
def by_command(few_rows, tmp_path_factory):
    """In this process; the results lie in a folder of the strategy's name."""
    from lmms_eval.cli.dispatch import main
    from loguru import logger

    folder, stderr = tmp_path_factory.mktemp("command"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()), redirect_stderr(stderr):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lmms-eval", *command_line(folder, few_rows)])
        main()
    logger.remove()
    logger.add(sys.__stderr__)
    return what_it_left(folder, stderr.getvalue())


@pytest.mark.slow
def test_lmms_evals_own_command_gives_the_same_scores(pocket, few_rows, by_command):
    work_dir, suite = few_rows
    theirs, said, shown = by_command
    ours = score_suite(pocket, suite, STRATEGY, work_dir=work_dir).scores
    assert 100 * theirs["few_gqa"]["exact_match,none"] == pytest.approx(ours["gqa"].score)
    assert 100 * theirs["few_scienceqa"]["exact_match,none"] == pytest.approx(ours["scienceqa"].score)
    assert theirs["few_mme"]["mme_perception_score,none"] == pytest.approx(ours["mme"].score)
    expected = {sample.doc_id: sample.prediction for sample in ours["mme"].samples}
    assert {row: answer for task, row, answer in said if task == "few_mme"} == expected
    assert shown == {(str(len(said)),) * 2}


@pytest.mark.slow
def test_two_processes_answer_half_each_and_give_the_same_results(few_rows, by_command, tmp_path):
    """As ``torchrun`` and ``accelerate launch`` start them."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    command = [*launcher, "-m", "lmms_eval", *command_line(tmp_path, few_rows)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    results, said, shown = what_it_left(tmp_path, done.stderr)
    assert shown == {(str(len(said) // 2),) * 2}, "the first process shows a bar of its own share"
    assert said == by_command[1], "no row is answered by both"
    assert results == by_command[0]


def test_a_suite_is_scored_by_one_process(pocket, few_rows, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(DopError, match=r"scored by one process, but this is one of 2 .*lmms-eval --model dop"):
        score_suite(pocket, few_rows[1], work_dir=tmp_path)


def test_each_process_takes_a_gpu_of_its_own(dop, monkeypatch):
    from dop_search.evaluation.lmms import model as wrapper

    monkeypatch.setattr(wrapper.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(wrapper.torch.cuda, "device_count", lambda: 4)
    assert wrapper._own_device("cuda") == "cuda"
    for name, value in (("WORLD_SIZE", "8"), ("RANK", "7"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    assert [wrapper._own_device(name) for name in (None, "auto", "cuda", "cpu", "cuda:0")] == [
        *("cuda:3", "cuda:3", "cuda:3", "cpu", "cuda:0")
    ]
    model = dop.simple(loaded=dop.loaded)
    assert (model.rank, model.world_size) == (7, 8)


def test_the_bundled_suite_names_what_it_is():
    suite = load_suite("pocket13")
    assert (suite.source, suite.judge, suite.limit) == ("rendered", False, None)
