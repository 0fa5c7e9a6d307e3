"""Tests lmms-eval's model `vica`: first the parts that need no lmms-eval, then the class, then its command line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import vica
from tests.engines import picture, seeing_model
from vica.data.conversation import get_template
from vica.engine import Engine, Request
from vica.integrations import lmms_eval_options
from vica.integrations.likelihood import Candidate, encode_candidate, log_likelihoods
from vica.integrations.lmms_eval_options import (
    ImageKeys,
    as_images,
    batch_limit,
    generation_options,
    grouped,
    parse_layers,
    prefetch,
    prompt_of,
    turn_text,
)
from vica.utils.errors import ViCAError

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ["What is this?", "Is there a star?", "How many?"]
CHOICES = ["Yes", "No", "red circle"]
LAYERS = [0, 1]  # other layers than the checkpoint's


# --- model arguments ---


@pytest.mark.parametrize(
    "given", ["[0,1,7]", "[0, 1, 7]", "[0;1;7]", "0;1;7", "0 1 7", " 0, 1,7 ", [0, 1, 7], (0, 1, 7)]
)
def test_layers_are_read_in_every_form_of_the_command_line(given):
    assert parse_layers(given) == [0, 1, 7]


def test_one_layer_no_layer_and_no_list():
    assert parse_layers(7) == [7] and parse_layers("[7]") == [7]
    assert parse_layers("[]") == [] and parse_layers(None) is None


@pytest.mark.parametrize("given", ["x", "", "[0,x]", "0-7", -1, 1.5, True])
def test_a_wrong_list_of_layers_is_named(given):
    with pytest.raises(ViCAError, match="t2v_layers is .*; give layer numbers"):
        parse_layers(given)


def test_max_batch_overrides_lmms_evals_batch_sizes():
    assert batch_limit(1) == 1 and batch_limit("64") == 64
    assert batch_limit("auto") is None and batch_limit("auto:4") is None and batch_limit("auto", 32) == 32
    assert batch_limit(1, 2, 3) == 3
    for wrong in ("0", "-1", "many", 1.5):
        with pytest.raises(ViCAError, match="batch_size is .* or auto"):
            batch_limit(wrong)


# --- generation settings ---


def options(**settings) -> tuple:
    got = generation_options(settings)
    return got["temperature"], got["top_p"], got["top_k"]


def test_do_sample_decides_and_without_it_the_temperature():
    assert options() == options(temperature=0, top_p=None, do_sample=False) == (0.0, 1.0, 0)
    assert options(do_sample=False, temperature=0.7, top_p=0.9) == (0.0, 1.0, 0)
    assert options(temperature=0.7, top_p=0.9, top_k=5) == (0.7, 0.9, 5)
    assert options(do_sample=True) == (1.0, 1.0, 0)
    assert options(do_sample=True, temperature=0) == options(temperature=0.2, top_p=0) == (0.0, 1.0, 0)


def test_lengths_stops_and_seeds():
    assert generation_options({})["max_new_tokens"] == 1024
    got = generation_options(dict(max_new_tokens=16, until=["</s>", "", "\n\n"], seed=0, num_beams=1))
    assert (got["max_new_tokens"], got["stop"], got["seed"]) == (16, ["</s>", "\n\n"], 0)
    assert generation_options(dict(until="Q:"))["stop"] == ["Q:"]
    assert generation_options(dict(until=[]))["stop"] is generation_options(dict(until=None))["stop"] is None
    for settings in (got, generation_options(dict(do_sample=True))):
        Request([1], **settings).check()


@pytest.mark.parametrize("name, value", [("num_beams", 5), ("repetition_penalty", 1.2), ("num_return_sequences", 2)])
def test_settings_that_the_engine_lacks_are_refused(name, value):
    with pytest.raises(ViCAError, match=f"asks for {name}={value}.*--gen_kwargs {name}=1"):
        generation_options({name: value})


def test_unknown_settings_are_warned_about_once(caplog):
    lmms_eval_options.warn_ignored.cache_clear()
    for _ in range(3):
        generation_options(dict(image_aspect_ratio="original"))
    assert [r.message for r in caplog.records] == [
        "a task's generation_kwargs name image_aspect_ratio, which is ignored"
    ]


# --- prompts and order ---


def test_images_stand_in_front_unless_the_task_marks_their_places():
    assert turn_text("What?", 0) == "What?"
    assert turn_text("What?", 2) == "<image>\n<image>\nWhat?"
    assert turn_text("A <image> b <image>?", 2) == "A <image> b <image>?"
    one = prompt_of("vicuna_v1", "What?", 1)
    assert one.endswith("polite answers to the user's questions. USER: <image>\nWhat? ASSISTANT:")


def test_visuals_of_all_kinds():
    image = picture()
    assert as_images(None) == as_images([]) == as_images([None]) == []
    assert as_images(image) == as_images([image]) == as_images((image, None)) == [image]


def test_questions_about_one_image_follow_each_other():
    assert grouped(["a", "b", "a", "c", "b"]) == [0, 2, 1, 4, 3]


def test_prefetched_items_come_in_order_and_a_failure_is_raised():
    assert list(prefetch(lambda x: 2 * x, range(50), 2)) == list(range(0, 100, 2))
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda x: 1 // x, [1, 0, 1], 2))


def test_images_are_distinguished_by_their_stored_data():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(dict(question=datasets.Value("string"), picture=datasets.Image()))
    shown = [picture(0), picture(1), picture(0)]
    stored = datasets.Dataset.from_list([dict(question=f"{i}?", picture=x) for i, x in enumerate(shown)], features)
    named = datasets.Dataset.from_list([dict(question=f"{i}?", imageId=x) for i, x in enumerate("aba")])
    text = datasets.Dataset.from_list([dict(question="?")] * 3)
    key = ImageKeys({"t": dict(stored=stored, named=named, text=text, rows=[{}, {}, {}])})
    for split in ("stored", "named"):
        first, other, again = (key("t", split, i) for i in range(3))
        assert first == again != other
    for split in ("text", "rows"):
        assert len({key("t", split, i) for i in range(3)}) == 3


# --- likelihoods ---


def one_by_one(model, processor, candidate: Candidate) -> tuple[float, bool]:
    """Returns a candidate's likelihood from a forward of its own, read off the logits of all positions."""
    ids, start = encode_candidate(processor, candidate)
    pixels = torch.tensor(np.stack(processor.process_images(candidate.images))) if candidate.images else None
    logits = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0].double().log_softmax(-1)
    steps = [(logits[i - 1], ids[i]) for i in range(start, len(ids))]
    return sum(float(row[x]) for row, x in steps), all(int(row.argmax()) == x for row, x in steps)


def some_candidates(model, processor) -> list[Candidate]:
    """Returns candidates of several lengths and numbers of images. The model is changed so that it says the last
    answer."""
    a, b = picture(1), picture(2)
    found = [Candidate(f"<image>\n{q}", f" {answer}", [a]) for q in QUESTIONS[:2] for answer in CHOICES]
    found += [Candidate("<image>\n<image>\nWhich?", "Yes", [a, b]), Candidate("No picture. Why?", "a star", [])]
    found += [Candidate("<image>\nWhat?", "", [b]), Candidate("<image>\nWhat?", "red", [b])]
    ids, start = encode_candidate(processor, found[-1])
    assert start == len(ids) - 1  # one token
    inputs = processor.ask("What?", [b])
    before = model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
    model.lm_head.weight[ids[-1]] = before / 4
    return found


@pytest.mark.parametrize("variant", ["accel", "mask", "dense"])
def test_likelihoods_of_a_batch_are_those_of_each_candidate_alone(variant):
    model, processor = seeing_model(variant=variant)
    with torch.no_grad():
        candidates = some_candidates(model, processor)
        want = [one_by_one(model, processor, candidate) for candidate in candidates]
    got = log_likelihoods(model, processor, candidates)
    assert [x for x, _ in got] == pytest.approx([x for x, _ in want], abs=1e-4)
    assert [x for _, x in got] == [x for _, x in want]
    assert got[-1][1] and got[-2] == (0.0, True) and not got[1][1]
    assert len({round(x, 2) for x, _ in got}) == len(got)  # question, image and answer all count


@pytest.mark.parametrize("conversation", ["vicuna_v1", "llama_2", "mistral", "plain"])
def test_an_answer_is_scored_where_the_template_puts_it(conversation):
    _, processor = seeing_model()
    processor = processor.changed(conversation)
    ids, start = encode_candidate(processor, Candidate("<image>\nIs there a star?", " Yes"))
    turns = [("user", "<image>\nIs there a star?"), ("assistant", "Yes")]
    template = get_template(conversation)
    assert processor.decode(ids[start:]).strip() == "Yes"
    assert ids == processor.tokenize(template.render(turns).removesuffix(template.closing))


def test_a_question_longer_than_the_model_is_an_error():
    model, processor = seeing_model(text_config=dict(max_position_embeddings=90))
    fits, longer = Candidate("What?", "Yes"), Candidate("<image>\nWhat?", "Yes", [picture()])
    assert len(encode_candidate(processor, longer)[0]) < 90  # without its picture's other tokens
    log_likelihoods(model, processor, [fits])
    with pytest.raises(ViCAError, match=r"takes \d+ positions with its answer, the model has 90"):
        log_likelihoods(model, processor, [fits, longer])


# --- the class ---


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Makes a checkpoint, and tasks on its pictures. In the choices every other document's gold answer is the
    likeliest."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install 'vica[eval]'")
    root = tmp_path_factory.mktemp("lmms")
    model, processor = seeing_model(text_config=dict(max_position_embeddings=512))
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    write_tasks(root)
    write_entry_point(root / "site")
    return root


def documents() -> list[dict]:
    """Returns documents in which a picture's questions are apart from each other; the second last has two pictures, and
    the last has none."""
    asked = [(question, [picture(i)]) for question in QUESTIONS for i in range(3)]
    asked += [("First <image> and then <image>?", [picture(0), picture(7)]), ("No picture. Why?", [])]
    return [dict(question=question, images=images) for question, images in asked]


def write_tasks(root: Path) -> None:
    from datasets import Dataset, Features, Image, Value

    (root / "tasks").mkdir()
    rows = [dict(question=x["question"], first=None, second=None) for x in documents()]
    for row, document in zip(rows, documents()):
        row |= dict(zip(("first", "second"), document["images"]))
    columns = Features(dict(question=Value("string"), first=Image(), second=Image()))
    Dataset.from_list(rows, columns).to_parquet(root / "documents.parquet")
    likeliest = [max(range(3), key=values.__getitem__) for values in likelihoods(root)]
    gold = [best if place % 2 else (best + 1) % 3 for place, best in enumerate(likeliest)]
    (root / "tasks/of_tests.py").write_text(
        "def visuals(doc): return [x for x in (doc['first'], doc['second']) if x is not None]\n"
        "def text(doc): return doc['question']\n"
        f"def choices(doc): return {CHOICES}\n"
        f"GOLD = {dict(zip([(x['question'], i) for i, x in enumerate(documents())], gold))}\n"
        "def gold(doc): return GOLD[(doc['question'], doc['place'])]\n"
        "def place(rows): return rows.add_column('place', list(range(len(rows))))\n"
        "def said(doc, results): return {'said': len(results[0])}\n"
        "def mean(items): return sum(items) / len(items)\n"
    )
    base = (
        f"dataset_path: parquet\ndataset_kwargs:\n  data_files:\n    test: {root}/documents.parquet\n"
        "test_split: test\nprocess_docs: !function of_tests.place\n"
        "doc_to_visual: !function of_tests.visuals\ndoc_to_text: !function of_tests.text\n"
    )
    says = (
        "output_type: generate_until\ndoc_to_target: question\nprocess_results: !function of_tests.said\n"
        "metric_list:\n- metric: said\n  aggregation: !function of_tests.mean\n  higher_is_better: true\n"
    )
    asked = "generation_kwargs: {max_new_tokens: 8, temperature: 0, top_p: 0, num_beams: 1, do_sample: false}\n"
    (root / "tasks/says.yaml").write_text(f"task: toy_says\n{base}{says}{asked}")
    stops = "generation_kwargs: {max_new_tokens: 20, until: ['e', 'o']}\n"
    (root / "tasks/stops.yaml").write_text(f"task: toy_stops\n{base}{says}{stops}")
    choice = (
        "output_type: multiple_choice\ndoc_to_target: !function of_tests.gold\n"
        "doc_to_choice: !function of_tests.choices\n"
        "metric_list:\n- metric: acc\n  aggregation: mean\n  higher_is_better: true\n"
    )
    (root / "tasks/choice.yaml").write_text(f"task: toy_choice\n{base}{choice}")


def likelihoods(root: Path) -> list[list[float]]:
    """Returns the plain model's likelihood of each choice, for each document."""
    model, processor = vica.load(root / "model", t2v_layers=LAYERS)
    with torch.no_grad():
        return [
            [
                one_by_one(model, processor, Candidate(turn_text(x["question"], len(x["images"])), c, x["images"]))[0]
                for c in CHOICES
            ]
            for x in documents()
        ]


def write_entry_point(site: Path) -> None:
    """Writes the files that an installation of the package leaves for other programs, from pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    info = site / "vica-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vica\nVersion: 0\n")
    lines = [f"[{name}]\n" + "".join(f"{k} = {v}\n" for k, v in found.items()) for name, found in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))


def engine_answers(root: Path, **options) -> list[str]:
    """Returns the answers of vica's engine, called as its users do."""
    engine = Engine(*vica.load(root / "model", t2v_layers=LAYERS))
    template = get_template(engine.processor.conversation)
    requests = []
    for x in documents():
        marks = "" if "<image>" in x["question"] else "<image>\n" * len(x["images"])
        requests.append(Request(template.render([("user", marks + x["question"])]), x["images"], **options))
    results = engine.generate(requests)
    assert not any(result.error for result in results)
    return [result.text.strip() for result in results]


@pytest.fixture
def adapter(world):
    """Returns `make(more)`, which makes the class as lmms-eval does from its command line, with one task loaded."""
    from vica.integrations.lmms_eval import ViCA

    def make(more: str = "", batch_size="3"):
        text = f"pretrained={world}/model,t2v_layers=[0,1],device=cpu{more}"
        model = ViCA.create_from_arg_string(text, dict(batch_size=batch_size, max_batch_size=None, device=None))
        model.task_dict["toy"] = dict(test=documents())
        return model

    return make


def instances(settings, kind="generate_until") -> list:
    """Returns lmms-eval's requests for all documents; `settings` may be a function of the document."""
    from lmms_eval.api.instance import Instance

    found = []
    for place, x in enumerate(documents()):
        given = settings(x) if callable(settings) else settings
        args = (x["question"], given, lambda doc, images=x["images"]: images, place, "toy", "test")
        found.append(Instance(kind, args, 0, dict(task="toy", doc_id=place, repeats=1)))
    return found


def test_answers_come_in_order_from_batches_grouped_by_image(world, adapter, monkeypatch):
    lm, order, batches = adapter(), [], []
    results, decode = lm.engine.results, lm.engine.runner.decode

    def recorded(requests):
        return results(order.append(r.id) or r for r in requests)

    def counted(batch, longest):
        batches.append(len(batch.prompts))
        return decode(batch, longest)

    monkeypatch.setattr(lm.engine, "results", recorded)
    monkeypatch.setattr(lm.engine.runner, "decode", counted)
    lm.task_dict["toy"]["test"] = with_ids(documents())
    got = lm.generate_until(instances(dict(max_new_tokens=8)))
    assert [x.text for x in got] == engine_answers(world, max_new_tokens=8)
    assert order == [0, 3, 6, 1, 4, 7, 2, 5, 8, 9, 10]
    assert max(batches) == 3
    assert all(x.token_counts.input_tokens > 16 and 1 <= x.token_counts.output_tokens <= 8 for x in got[:9])


def with_ids(rows: list[dict]):
    """A dataset that names its images."""
    from datasets import Dataset

    return Dataset.from_dict(dict(image_id=[f"picture {i % 3}" if i < 9 else f"other {i}" for i in range(len(rows))]))


def test_one_bad_question_fails_the_run_or_counts_as_an_empty_answer(world, adapter):
    requests = instances(dict(max_new_tokens=4))
    requests[4].arguments = ("Two <image> marks <image>?", *requests[4].arguments[1:])
    with pytest.raises(ViCAError, match=r"toy, document 4: the prompt has 2 places for images, but 1 were given"):
        adapter().generate_until(requests)
    got = [x.text for x in adapter(",allow_errors=true").generate_until(requests)]
    want = engine_answers(world, max_new_tokens=4)
    assert got == [*want[:4], "", *want[5:]]


def test_unsupported_requests_are_errors(adapter):
    lm = adapter()
    with pytest.raises(ViCAError, match="num_beams=4"):
        lm.generate_until(instances(dict(num_beams=4)))
    with pytest.raises(NotImplementedError, match="no multi-round tasks"):
        lm.generate_until_multi_round(instances({}))
    alone = instances("Yes", "loglikelihood")
    alone[3].arguments = ("", "Yes")
    with pytest.raises(NotImplementedError, match="without their question"):
        lm.loglikelihood(alone)


def test_sampling_follows_the_seed_of_lmms_eval_and_repeats_differ(adapter):
    lm, requests = adapter(), [instances(dict(do_sample=True, temperature=5.0, max_new_tokens=8))[0]] * 4

    def drawn(seed):
        torch.manual_seed(seed)
        return [x.text for x in lm.generate_until(requests)]

    first = drawn(1)
    assert first == drawn(1) != drawn(2)
    assert len(set(first)) == 4


def test_likelihoods_have_the_sign_of_each_kind_of_task(world, adapter):
    lm = adapter()
    want = [values[0] for values in likelihoods(world)]
    lm.generate_until(instances(dict(max_new_tokens=2)))  # with an engine on the same weights before and after
    chosen = [x.text for x in lm.loglikelihood(instances(" Yes", "loglikelihood"))]
    assert lm._engine is None  # it would occupy nearly all of a card's memory
    assert [x for x, _ in chosen] == pytest.approx([-x for x in want], abs=1e-4)
    scored = [x.text for x in lm.loglikelihood(instances(lambda x: lambda document: "Yes", "loglikelihood"))]
    assert [x for x, _ in scored] == pytest.approx(want, abs=1e-4)
    assert [x.text for x in lm.generate_until(instances(dict(max_new_tokens=8)))] == engine_answers(
        world, max_new_tokens=8
    )


def test_each_process_takes_its_own_card(adapter, monkeypatch):
    lm = adapter()
    assert (lm.rank, lm.world_size, lm.device, lm.batch_size) == (0, 1, torch.device("cpu"), 3)
    assert lm._own_device(None) is None and lm._own_device("cuda:1") == "cuda:1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    lm._world_size, lm.accelerator = 2, SimpleNamespace(local_process_index=1)
    assert lm._own_device(None) == lm._own_device("cuda") == "cuda:1"
    assert lm._own_device("cpu") == "cpu"


def test_the_template_and_layers_of_the_arguments_are_used(adapter, monkeypatch):
    lm = adapter(",conv_template=llama_2,freeze_prefix=False,dtype=bfloat16,max_batch=5", batch_size=1)
    assert lm.processor.conversation == "llama_2" and lm.model.dtype == torch.bfloat16
    assert lm.model.config.t2v_layers == [0, 1] and lm.model.config.freeze_prefix is False
    assert lm.engine.max_batch == 5


# --- the command ---


def run_lmms_eval(world: Path, arguments: str, tasks: str, out: str, launcher=(), **environment) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("T2V_LAYERS", "RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join([str(ROOT), str(world / "site")])
    settings = dict(PYTHONPATH=path, HF_HOME=str(world / "hf"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    start = launcher or [str(Path(sys.executable).with_name("lmms-eval"))]
    command = [
        *start, "--model", "vica", "--model_args", f"pretrained={world}/model{arguments}", "--tasks", tasks,
        "--include_path", str(world / "tasks"), "--device", "cpu", "--log_samples", "--output_path", str(world / out),
        "--batch_size", "4",
    ]  # fmt: skip
    ran = subprocess.run(command, env=clean | settings | environment, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout + ran.stderr


def samples(world: Path, out: str, task: str) -> list[dict]:
    (file,) = (world / out).glob(f"*/*_samples_{task}.jsonl")
    return sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda x: x["doc_id"])


def check_samples(world: Path, out: str) -> None:
    """Checks that the log holds the engine's answers to two tasks, and accuracies from the plain model's
    likelihoods."""
    for task, options in (("says", dict(max_new_tokens=8)), ("stops", dict(max_new_tokens=20, stop=["e", "o"]))):
        logged = [x["filtered_resps"] for x in samples(world, out, f"toy_{task}")]
        assert logged == engine_answers(world, **options)
    logged = samples(world, out, "toy_choice")
    for sample, want in zip(logged, likelihoods(world), strict=True):
        assert [float(x) for x, _ in sample["filtered_resps"]] == pytest.approx([-x for x in want], abs=1e-4)
        assert sample["acc"] == sample["doc_id"] % 2  # as write_tasks placed the gold answers
    (file,) = (world / out).glob("*/*_results.json")
    accuracy = json.loads(file.read_text())["results"]["toy_choice"]["acc,none"]
    assert accuracy == pytest.approx(5 / 11)


@pytest.mark.slow
def test_the_command_logs_the_engines_own_answers(world):
    told = run_lmms_eval(world, ",t2v_layers=[0,1]", "toy_says,toy_stops,toy_choice", "out", T2V_LAYERS="[3]")
    assert "22/22" in told and "answers/s" in told and "33/33" in told
    check_samples(world, "out")
    changed = engine_answers(world, max_new_tokens=8)
    model, processor = vica.load(world / "model")
    stored = Engine(model, processor).generate([Request.ask(x["question"], x["images"], max_new_tokens=8)
                                                for x in documents()[:9]])  # fmt: skip
    assert changed[:9] != [x.text.strip() for x in stored]  # the named layers made a difference


@pytest.mark.slow
def test_two_processes_and_layers_from_the_environment(world):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--main_process_port", "0", "-m", "lmms_eval"]
    run_lmms_eval(world, "", "toy_says,toy_stops,toy_choice", "two", launcher, T2V_LAYERS="[0,1]")
    check_samples(world, "two")
