"""Tests `vica eval` as a user types it: exit codes, output, and which earlier answers it accepts as the model's own."""

import json
import shutil

import pytest

from vica.cli.main import main
from vica.testing import save
from vica.toy.benchmarks import write
from vica.utils.files import held


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("toy") / "model")


def write_data(folder):
    write(folder, 4)
    return folder


def evaluate(tasks, model, data, out, *flags) -> int:
    told = ["--model", str(model), "--data", str(data), "--out", str(out), "--device", "cpu", "--max-new-tokens", "2"]
    return main(["eval", *tasks.split(), *told, *map(str, flags)])


def test_a_broken_image_changes_the_exit_code(model, tmp_path, capsys):
    data, out = write_data(tmp_path / "data"), tmp_path / "out"
    picture = next((data / "pope" / "val2014").iterdir())
    whole = picture.read_bytes()
    picture.write_bytes(b"no picture")
    assert evaluate("pope", model, data, out) == 1
    said = capsys.readouterr()
    assert "POPE" in said.out and f"{picture.name}': not an image" in said.out
    assert said.err.startswith("vica eval: questions without an answer: pope ") and said.err.count("\n") == 1
    assert evaluate("pope", model, data, out, "--allow-errors") == 0
    (row,) = json.loads((out / "summary.json").read_text())["benchmarks"]
    assert 0 < row["failed"] < row["questions"] and row["score"] is not None
    assert evaluate("pope", model, data, out) == 1
    picture.write_bytes(whole)
    assert evaluate("pope", model, data, out) == 0


def test_json_is_all_that_stdout_holds(model, data, tmp_path, capsys):
    assert evaluate("pope", model, data, tmp_path / "out", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    files = told.pop("files")
    assert told == json.loads((tmp_path / "out/summary.json").read_text())
    assert str(tmp_path / "out/summary.json") in files and told["benchmarks"][0]["task"] == "pope"


def test_failed_questions_count_as_wrong(model, tmp_path):
    data = write_data(tmp_path / "data")
    for path in data.rglob("*"):
        if path.is_file() and path.suffix in (".jpg", ".png", ""):  # SEED-Bench names its pictures without a suffix
            path.write_bytes(b"no picture")
    tasks = "vqav2 gqa textvqa pope mme seed"  # the others have pictures inside their tables, or questions without one
    assert evaluate(tasks, model, data, tmp_path / "out", "--allow-errors") == 0
    rows = json.loads((tmp_path / "out/summary.json").read_text())["benchmarks"]
    assert [row["failed"] for row in rows] == [row["questions"] for row in rows]
    assert [row["score"] for row in rows] == [0] * len(rows)


def test_a_further_benchmark_joins_the_summary(model, data, tmp_path):
    """Each of the nine scripts writes into the same folder. A benchmark that runs again replaces its row."""

    def rows() -> list[tuple]:
        told = json.loads((tmp_path / "summary.json").read_text())["benchmarks"]
        return [(row["task"], row["questions"]) for row in told]

    assert evaluate("pope", model, data, tmp_path, "--limit", 3) == 0
    assert evaluate("mme", model, data, tmp_path, "--limit", 2) == 0
    assert rows() == [("pope", 3), ("mme", 2)]
    assert evaluate("pope", model, data, tmp_path, "--limit", 1, "--restart") == 0
    assert rows() == [("pope", 1), ("mme", 2)]
    assert evaluate("mme", model, data, tmp_path, "--limit", 2, "--restart", "--variant", "dense") == 0
    assert rows() == [("mme", 2)], "another function's scores are no row beside these"


def test_a_model_by_another_name_is_the_same(model, data, tmp_path, monkeypatch):
    assert evaluate("pope", model, data, tmp_path, "--limit", 2) == 0
    monkeypatch.chdir(model.parent)
    assert evaluate("pope", f"{model.name}/", data, tmp_path, "--limit", 2) == 0


def test_variants_answer_alike_with_any_generation_config(model, data, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    asked = dict(num_beams=3, repetition_penalty=1.8, no_repeat_ngram_size=1, min_length=400, eos_token_id=2)
    (tmp_path / "model/generation_config.json").write_text(json.dumps(asked))
    for variant in ("accel", "mask"):
        flags = ("--variant", variant, "--max-new-tokens", 8, "--dtype", "float32", "--limit", 8)
        assert evaluate("gqa", tmp_path / "model", data, tmp_path / variant, *flags) == 0
    accel, mask = ((tmp_path / variant / "gqa/answers.jsonl").read_text() for variant in ("accel", "mask"))
    assert accel == mask


def test_questions_have_one_source(data, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        evaluate("pope", "no/model/at/all", data, tmp_path, "--hub")
    assert ended.value.code == 2 and "--hub: not allowed with argument --data" in capsys.readouterr().err


def test_files_with_other_contents_are_a_one_line_error(tmp_path, capsys):
    """For example another file under the same name, such as the questions of a split without answers."""
    data = write_data(tmp_path / "data")
    wrong = [
        ("vqav2", "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", "[]"),
        ("vqav2", "vqav2/v2_mscoco_val2014_annotations.json", '{"annotations": [{}]}'),
        ("vqav2 --split test-dev", "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", '{"question_id": 1}\n'),
        ("textvqa", "textvqa/llava_textvqa_val_v051_ocr.jsonl", "[1]\n"),
        ("textvqa", "textvqa/TextVQA_0.5.1_val.json", '{"data": [{"image_id": "x", "question": "y"}, 3]}'),
        ("sqa", "scienceqa/pid_splits.json", "{}"),
        ("sqa", "scienceqa/problems.json", "3"),
        ("mmbench", "mmbench/mmbench_dev_20230712.tsv", f"index\tquestion\timage\tA\tB\n\t\t{'x' * 99}\ta\tb\n"),
        ("mmbench", "mmbench/mmbench_dev_20230712.tsv", f"index\tquestion\timage\tA\tB\n1\t?\r\r?\t{'x' * 99}\ta\tb\n"),
        ("gqa", "gqa/llava_gqa_testdev_balanced.jsonl", '{"question_id": [], "image": "a", "text": "b"}\n'),
    ]
    for tasks, file, text in wrong:
        whole = (data / file).read_bytes()
        (data / file).write_text(text)
        assert evaluate(tasks, "no/model/at/all", data, tmp_path) == 1, file
        said = capsys.readouterr().err
        assert said.startswith("vica eval: ") and said.count("\n") == 1 and str((data / file).parent) in said, said
        (data / file).write_bytes(whole)


def test_answers_of_other_weights_in_the_same_folder_are_refused(data, tmp_path, capsys):
    """For example of a checkpoint that was trained further or replaced."""
    model, out = save(tmp_path / "model"), tmp_path / "out"
    assert evaluate("pope", model, data, out) == 0 == evaluate("pope", model, data, out)
    save(model, seed=1)
    capsys.readouterr()
    assert evaluate("pope", model, data, out) == 1
    assert "holds answers of another run: weights '" in capsys.readouterr().err
    assert evaluate("pope", model, data, out, "--restart") == 0


def test_answers_of_another_run_are_refused_before_any_benchmark_starts(model, data, tmp_path):
    assert evaluate("mme", model, data, tmp_path, "--limit", 2) == 0
    assert evaluate("pope mme", model, data, tmp_path) == 1
    assert not (tmp_path / "pope").exists()
    assert evaluate("pope mme", model, data, tmp_path, "--restart") == 0


def test_two_simultaneous_runs_do_not_share_a_folder(model, data, tmp_path, capsys):
    with held(tmp_path / "mme", "--out"):
        assert evaluate("pope mme", model, data, tmp_path) == 1
        assert f"{tmp_path / 'mme'} is being written by another run; --out FOLDER" in capsys.readouterr().err
        assert evaluate("pope mme", model, data, tmp_path, "--restart") == 1
        assert not list((tmp_path / "pope").iterdir()), "refused before anything is asked"
        assert evaluate("pope", model, data, tmp_path) == 0
    assert evaluate("pope mme", model, data, tmp_path) == 0


def test_another_limit_is_named(model, data, tmp_path, capsys):
    assert evaluate("pope", model, data, tmp_path, "--limit", 2) == 0
    assert evaluate("pope", model, data, tmp_path) == 1
    assert "holds answers of another run: questions '2 (" in capsys.readouterr().err
    assert evaluate("pope", model, data, tmp_path, "--limit", 2) == 0


def test_a_file_that_is_no_baseline_is_refused_at_once(data, tmp_path, capsys):
    for text in ("[]", "{}", '{"benchmarks": [{}]}', '{"benchmarks": ["x"]}', '{"benchmarks": 3}', "\xff"):
        (tmp_path / "summary.json").write_bytes(text.encode("latin-1"))
        assert evaluate("pope", "no/model/at/all", data, tmp_path, "--baseline", tmp_path / "summary.json") == 1
        assert capsys.readouterr().err.endswith("summary.json is no summary.json of vica eval\n")


def test_a_baseline_of_other_questions_is_refused(model, data, tmp_path, capsys):
    assert evaluate("pope", model, data, tmp_path / "a", "--limit", 2) == 0
    file = tmp_path / "a" / "summary.json"
    assert evaluate("pope", "no/model/at/all", data, tmp_path / "b", "--baseline", file) == 1
    said = capsys.readouterr().err
    assert f"{file} has 2 questions of pope, this run " in said and "--limit, --split and the data must be" in said
    assert evaluate("pope", model, data, tmp_path / "b", "--limit", 2, "--baseline", file) == 0
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["baseline"] == str(file)


def test_a_baseline_of_other_benchmarks_compares_nothing(model, data, tmp_path):
    assert evaluate("pope", model, data, tmp_path / "a") == 0
    assert evaluate("mme", model, data, tmp_path / "b", "--baseline", tmp_path / "a" / "summary.json") == 0
    (row,) = json.loads((tmp_path / "b" / "summary.json").read_text())["benchmarks"]
    assert row["task"] == "mme" and row["percent_of_baseline"] is None


def test_the_answers_folder_has_the_models_name(model, data, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    for file in model.iterdir():
        (tmp_path / "mine" / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path / "mine")
    flags = ["--data", str(data), "--device", "cpu", "--max-new-tokens", "2", "--limit", "1"]
    assert main(["eval", "pope", "--model", ".", *flags]) == 0
    assert (tmp_path / "mine/playground/answers/mine/pope/answers.jsonl").exists()
