"""The `vica` program, verb by verb, as a user types it."""

import base64
import io
import json
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

import vica
from vica.cli.chat import Talk
from vica.cli.main import VERBS, main
from vica.toy.model import save

GREEDY = dict(max_new_tokens=4, do_sample=False, pad_token_id=3, eos_token_id=None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save(tmp_path_factory.mktemp("toy") / "model"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.linear_gradient("L").convert("RGB").resize((90, 60)).save(path)
    return path


def ask(model, *arguments) -> int:
    return main(["ask", "--model", model, "--device", "cpu", "--max-new-tokens", "4", *arguments])


def test_ask_prints_the_answer_alone(model, picture, capsys):
    answers = []
    for variant in ("accel", "mask", "dense"):
        assert ask(model, "--image", str(picture), "--variant", variant, "What is it?") == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and answers[0].strip() and answers[0].count("\n") == 1


def test_pictures_by_url_by_data_and_by_path_are_the_same(model, picture, capsys):
    handler = partial(SimpleHTTPRequestHandler, directory=str(picture.parent))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/{picture.name}"
        data = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
        outs = []
        for source in (str(picture), url, data):
            assert ask(model, "--image", source, "--image", source, "And these?") == 0
            outs.append(capsys.readouterr().out)
        assert outs[0] == outs[1] == outs[2]
        assert ask(model, "--image", url + "x", "And this?") == 1
        assert "404" in capsys.readouterr().err
    finally:
        server.shutdown()


def bomb() -> bytes:
    """A valid PNG of 30000x30000 that is small on disk."""
    file = io.BytesIO()
    Image.new("1", (30000, 30000)).save(file, "png", optimize=True)
    return file.getvalue()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("missing.png", None, "no such file"),
        ("text.png", b"hello", "not an image"),
        ("cut.png", "cut", "cannot be read"),
        ("bomb.png", bomb, "more than PIL.Image.MAX_IMAGE_PIXELS = 89478485 pixels"),
    ],
)
def test_bad_pictures(model, picture, tmp_path, capsys, name, content, message):
    path = tmp_path / name
    if content is not None:
        content = picture.read_bytes()[:-60] if content == "cut" else content
        path.write_bytes(content() if callable(content) else content)
    assert ask(model, "--image", str(path), "What?") == 1
    error = capsys.readouterr().err
    assert name in error and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--t2v-layers", "[0,99]"], "'[0,99]': 99 is no layer"),
        (["--t2v-layers", "[0,0]"], "twice"),
        (["--t2v-layers", "abc"], "'abc'"),
        (["--t2v-layers", "[1.5]"], "1.5"),
        (["--freeze-prefix", "maybe"], "'maybe'"),
        (["--freeze-prefix", "99"], "99"),
        (["--template", "nope"], "unknown conversation template 'nope'"),
        (["--image-mode", "stretch"], "stretch"),
        (["--device", "cuda:77"], "CUDA"),
        (["--device", "toaster"], "toaster"),
        (["--dtype", "int3"], "int3"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--temperature", "-1"], "--temperature is -1"),
        (["--config", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_options_are_one_line(model, capsys, arguments, message):
    assert ask(model, *arguments, "What?") == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_no_such_model(capsys):
    assert ask("./nowhere", "What?") == 1
    assert "nowhere is no folder" in capsys.readouterr().err


def test_sampling_repeats_with_its_seed(model, capsys):
    outs = []
    for seed in ("1", "1", "2"):
        assert ask(model, "--temperature", "1.5", "--seed", seed, "What?") == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]


def test_the_real_program(model, picture):
    """As a process: exit codes, nothing but the answer on stdout, help for every verb."""
    run = partial(subprocess.run, capture_output=True, text=True)
    program = [sys.executable, "-m", "vica.cli.main"]
    good = run([*program, "ask", "--model", model, "--image", str(picture), "--max-new-tokens", "3", "What?"])
    assert good.returncode == 0 and good.stdout.count("\n") == 1 and "Traceback" not in good.stderr
    bad = run([*program, "ask", "--model", model, "--image", "nope.png", "What?"])
    assert bad.returncode == 1 and bad.stdout == "" and bad.stderr.count("\n") == 1
    assert run([*program, "dance"]).returncode == 2


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0 and "usage: vica " + verb in capsys.readouterr().out


@pytest.mark.parametrize("variant", ["accel", "mask"])
def test_chat_keeps_its_cache_and_answers_as_if_it_had_none(model, picture, variant, capsys):
    """Each turn's answer equals generate on all tokens so far, without a cache."""
    loaded, processor = vica.load(model, variant=variant, device="cpu")
    talk, pixels = Talk(loaded, processor, GREEDY), []
    for text, count in (("Hello there", 0), ("What is in these?", 2), ("And now?", 0), ("This one?", 1)):
        images = [Image.open(picture).convert("RGB").rotate(30 * i) for i in range(count)]
        before, length = talk.cache, 0 if talk.ids is None else talk.ids.shape[1]
        answer = talk.say(text, images)
        assert before is None or talk.cache is before, "one cache for the whole talk"
        assert length == 0 or talk.ids[0, length] == processor.tokenizer.eos_token_id, "a cut-off answer is ended"
        assert answer in capsys.readouterr().out, "streamed as it came"
        pixels += images
        prompt = talk.ids[:, : -GREEDY["max_new_tokens"]]
        given = processor(images=pixels)["pixel_values"] if pixels else None
        again = loaded.generate(prompt, pixel_values=given, **GREEDY)
        assert again.tolist() == talk.ids.tolist()


def test_chat_as_a_program(model, picture):
    lines = f"/image nope.png\n/image {picture}\nWhat is it?\nAnd?\n/reset\nWhat?\n/exit\nnever read\n"
    program = [sys.executable, "-m", "vica.cli.main", "chat", "--model", model, "--max-new-tokens", "3"]
    run = subprocess.run(program, input=lines, capture_output=True, text=True)
    assert run.returncode == 0 and "Traceback" not in run.stderr
    assert "nope.png" in run.stderr, "a wrong path does not end the talk"
    assert len(run.stdout.splitlines()) >= 3


def test_info(model, capsys):
    assert main(["info", model]) == 0
    out = capsys.readouterr().out
    assert "█··█····" in out and "576 visual tokens" in out
    assert "1,179,648 an image, 8,192 a text token" in out  # 2 of 8 layers, 2 x 256 x 2 bytes each
    assert main(["info", model, "--t2v-layers", "[0,1,2,3,4,5,6,7]", "--freeze-prefix", "2"]) == 0
    assert "████████" in capsys.readouterr().out


def test_info_of_a_checkpoint_that_names_no_layers(model, tmp_path, capsys):
    config = json.loads(open(f"{model}/config.json").read())
    for key in ("t2v_layers", "freeze_prefix", "variant"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llava_llama"}))
    assert main(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "shown as dense" in out and "100.0%" in out
    assert main(["info", str(tmp_path), "--config", "configs/vica-llava-1.5-7b.json"]) == 1, "layer 8 of 8"
    assert "is no layer" in capsys.readouterr().err


def test_convert(model, picture, tmp_path, capsys):
    outs = []
    assert ask(model, "--image", str(picture), "What?") == 0
    outs.append(capsys.readouterr().out)
    for to in ("llava", "hf", "vica"):
        assert main(["convert", model, str(tmp_path / to), "--to", to]) == 0
        capsys.readouterr()
        assert ask(str(tmp_path / to), "--image", str(picture), "--image-mode", "pad", "What?") == 0
        outs.append(capsys.readouterr().out)
    assert len(set(outs)) == 1
    assert main(["convert", model, str(tmp_path / "hf"), "--to", "vica"]) == 1
    assert "nothing is overwritten" in capsys.readouterr().err
