"""Tests the `vica` program, verb by verb, as a user types it."""

import base64
import io
import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

import vica
from vica.cli.main import VERBS, main
from vica.cli.talk import Talk
from vica.plan.vica import VARIANTS
from vica.testing import save

UTF_8 = {"PYTHONUTF8": "1"}
GREEDY = dict(max_new_tokens=8, temperature=0.0, seed=0)


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


def generate(model: str, variant: str, ids: list[int], images: list, new_tokens: int) -> list[int]:
    """Returns the plain model's answer after these ids, computed without a cache from earlier turns."""
    plain, processor = vica.load(model, variant=variant, device="cpu")
    pixels = processor(images=images)["pixel_values"] if images else None
    ids = torch.tensor([ids])
    mask = torch.ones_like(ids)
    out = plain.generate(ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=new_tokens, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_ask_prints_generates_answer_alone(model, picture, variant, capsys):
    options = ["--image", str(picture), "--variant", variant, "--max-new-tokens", "12"]
    assert ask(model, *options, "What is it?") == 0
    out, processor = capsys.readouterr().out, vica.load(model, device="cpu")[1]
    ids = processor.ask("What is it?", [picture])["input_ids"][0].tolist()
    answer = processor.decode(generate(model, variant, ids, [picture], 12), skip_special_tokens=True).strip()
    assert answer and out == answer + "\n"


@pytest.mark.parametrize("variant", ["accel", "mask"])
def test_answers_stream(model, variant, monkeypatch):
    class Terminal(io.StringIO):
        shown = []

        def flush(self):
            self.shown.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Terminal())
    assert ask(model, "--variant", variant, "--max-new-tokens", "12", "What is it?") == 0
    growing = [x for x, y in zip(Terminal.shown, Terminal.shown[1:]) if x != y]
    assert len(growing) > 4 and all(sys.stdout.getvalue().startswith(x) for x in growing)


def test_answers_are_stripped_of_white_space(model, monkeypatch, capsys):
    talk = Talk(*vica.load(model, device="cpu"), GREEDY)
    monkeypatch.setattr(talk, "_fast", lambda request, write: [write(x) or 5 for x in (" ", "\n a", " ", "\n", "b \n")])
    assert talk.say("What?", []) == "a \nb" and capsys.readouterr().out == "a \nb\n"


@pytest.mark.parametrize("variant", VARIANTS)
def test_stop_strings(model, picture, variant, capsys):
    def answer(*options):
        assert ask(model, "--variant", variant, "--image", str(picture), "--max-new-tokens", "12", *options, "So?") == 0
        return capsys.readouterr().out[:-1]

    whole = answer()
    early, late = whole[3:5], whole[6:9]
    assert answer("--stop", late, "--stop", "never said", "--stop", early) == whole[: whole.index(early)].strip()
    assert answer("--stop", "never said") == whole


def test_a_stop_string_ends_the_tokens_too(model):
    """The next turn of a chat is the same with every way of generating."""
    kept = []
    for variant in ("accel", "mask"):
        talk = Talk(*vica.load(model, variant=variant, device="cpu"), {**GREEDY, "max_new_tokens": 200, "stop": ["e"]})
        talk.say("What is it?", [])
        assert len(talk.ids) < 200 and "e" in talk.processor.decode(talk.ids[-1:])
        kept.append(talk.ids)
    assert kept[0] == kept[1]


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
    """Writes a valid PNG of 30000x30000 pixels that is small on disk."""
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
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--temperature", "nan", "--variant", "mask"], "temperature is nan"),
        (["--top-p", "1.5"], "top_p is 1.5"),
        (["--top-k", "-2"], "top_k is -2"),
        (["--stop", ""], "stop is ['']"),
        (["--seed", str(2**70)], f"seed is {2**70}"),
        (["--config", "nowhere.json"], "config 'nowhere.json' is no file; configs/ holds"),
        (["--config", "configs/zero2.json"], "names neither freeze_prefix nor t2v_layers"),
        (["--stop", ".", "caf\udce9"], "the text is not UTF-8"),
    ],
)
def test_bad_options_are_one_line(model, capsys, arguments, message):
    assert ask(model, *(arguments if len(arguments) % 2 else [*arguments, "What?"])) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_no_such_model(capsys):
    assert ask("./nowhere", "What?") == 1
    assert "nowhere is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("variant", VARIANTS)
def test_sampling_repeats_with_its_seed(model, variant, capsys):
    outs = []
    for options in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--top-k", "1"], ["--top-p", "1e-6"]):
        assert ask(model, "--variant", variant, "--temperature", "1.5", *options, "What?") == 0
        outs.append(capsys.readouterr().out)
    assert ask(model, "--variant", variant, "What?") == 0
    assert outs[0] == outs[1] != outs[2]
    assert outs[3] == outs[4] == capsys.readouterr().out != outs[0], "the likeliest token alone is left"


def test_the_real_program(model, picture):
    """Runs it as a process: exit codes, only the answer on stdout, help for every verb."""
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


def test_help_shows_the_default_answer_length(capsys):
    with pytest.raises(SystemExit):
        main(["ask", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for default in ("--max-new-tokens N (default: 512)", "0: greedy (default: 0.0)", "0: all tokens (default: 0)"):
        assert default in told


@pytest.mark.parametrize("variant", VARIANTS)
def test_chat_answers_as_the_plain_model_does(model, picture, variant):
    """Each turn's answer equals generate's on all tokens so far, with an end mark after truncated answers."""
    loaded, processor = vica.load(model, variant=variant, device="cpu")
    talk, ids, given, end = Talk(loaded, processor, GREEDY), [], [], processor.tokenizer.eos_token_id
    for text, count in (("Hello there", 0), ("What is this?", 1), ("And this one?", 1), ("Both?", 0)):
        images = [Image.open(picture).convert("RGB").rotate(30 * (len(given) + i)) for i in range(count)]
        given += images
        if not ids:
            ids = processor.ask(text)["input_ids"][0].tolist()
        else:
            ids += [end] * (ids[-1] != end) + processor.tokenize_next_turn("<image>\n" * count + text)
        answer = generate(model, variant, ids, given, 8)
        ids += answer
        assert talk.say(text, images) == processor.decode(answer, skip_special_tokens=True).strip()
        assert talk.ids == ids
    if talk.engine:
        assert talk.engine.image_memory.misses == 2, "nothing of an image is computed twice"


def test_an_answer_that_ended_itself_gets_no_second_end_mark(model):
    loaded, processor = vica.load(model, device="cpu")
    talk = Talk(loaded, processor, GREEDY)
    talk.say("What is it?", [])
    end = talk.ids[-1]
    loaded.generation_config.eos_token_id = end
    processor.tokenizer.eos_token = processor.tokenizer.convert_ids_to_tokens(end)
    talk = Talk(loaded, processor, GREEDY)
    talk.say("What is it?", [])
    length = len(talk.ids)
    talk.say("And?", [])
    assert talk.ids[length - 1] == end
    assert talk.ids[length : length + 4] == processor.tokenize_next_turn("And?")[:4]


@pytest.mark.parametrize("variant", ["accel", "mask"])
def test_a_generated_placeholder_is_no_image(model, picture, variant):
    loaded, processor = vica.load(model, variant=variant, device="cpu")
    talk = Talk(loaded, processor, GREEDY)
    talk.say("What is it?", [])
    generated = next(x for x in talk.ids[-8:] if x not in talk.ids[:-8] + processor.tokenize_next_turn("And?"))
    loaded.config.image_token_index = processor.image_token_index = generated
    talk = Talk(loaded, processor, GREEDY)
    talk.say("What is it?", [])
    talk.say("And?", [picture])
    assert talk.ids.count(generated) == 1


def chat(model, lines: list[str], monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    return main(["chat", "--model", model, "--device", "cpu", "--max-new-tokens", "4", *arguments])


def test_a_chat_continues_after_a_message_that_does_not_fit(model, picture, monkeypatch, capsys):
    """The message is dropped; its image waits for the next message."""
    assert chat(model, ["What?", f"/image {picture}", "And?", "/reset", "What?"], monkeypatch) == 0
    want = capsys.readouterr().out
    lines = ["What?", f"/image {picture}", "long " * 2048, "And?", "long " * 2048, "/reset", "What?"]
    assert chat(model, lines, monkeypatch) == 0
    got = capsys.readouterr()
    assert got.out == want and got.out.splitlines()[0] == got.out.splitlines()[-1]
    assert got.err.count("\n") == 2 and all("positions" in line for line in got.err.splitlines())


@pytest.mark.parametrize("variant", ["accel", "mask"])
def test_a_question_too_long(model, variant, capsys):
    assert ask(model, "long " * 2048, "--variant", variant) == 1
    got = capsys.readouterr()
    assert got.out == "" and "the model has 2048" in got.err and got.err.count("\n") == 1


def test_an_answer_ends_with_the_models_positions(model, capsys):
    taken = len(vica.load(model, device="cpu")[1].ask("What?")["input_ids"][0])
    said = []
    for variant in ("accel", "mask"):
        assert ask(model, "What?" + "?" * (2047 - taken), "--variant", variant) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != "\n"


def test_bytes_of_another_encoding_do_not_end_the_chat(model):
    program = [sys.executable, "-m", "vica.cli.main", "chat", "--model", model, "--max-new-tokens", "3"]
    run = subprocess.run(program, input=b"caf\xe9?\nWhat?\n/exit\n", capture_output=True, env=os.environ | UTF_8)
    assert run.returncode == 0 and run.stderr.count(b"\n") == 1 and b"the text is not UTF-8" in run.stderr
    assert run.stdout.strip()


def test_chat_as_a_program(model, picture):
    lines = f"/image nope.png\n/image {picture}\nWhat is it?\nAnd?\n/reset\nWhat?\n/exit\nnever read\n"
    program = [sys.executable, "-m", "vica.cli.main", "chat", "--model", model, "--max-new-tokens", "3"]
    run = subprocess.run(program, input=lines, capture_output=True, text=True)
    assert run.returncode == 0 and "Traceback" not in run.stderr
    assert "nope.png" in run.stderr and run.stderr.count("\n") == 1, "a wrong path does not end the talk"
    assert len(run.stdout.splitlines()) >= 3


def test_info(model, capsys):
    assert main(["info", model]) == 0
    out = capsys.readouterr().out
    assert "after 35 tokens of text" in out
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


@pytest.mark.parametrize("variant", ["accel", "mask"])
def test_ask_as_json(model, picture, variant, capsys):
    options = ["--image", str(picture), "--variant", variant, "What is it?"]
    assert ask(model, *options) == 0
    answer = capsys.readouterr().out.strip()
    assert ask(model, *options, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told.pop("answer") == answer and told.pop("question") == "What is it?"
    wiring = dict(variant=variant, t2v_layers=[0, 3], freeze_prefix=True)
    assert told == dict(images=[str(picture)], answer_tokens=4, finish_reason="length", model=model, **wiring)
    assert ask(model, *options, "--json", "--stop", answer[:1]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["answer"], told["finish_reason"]) == ("", "stop")
    assert ask(model, "--json", "long " * 2048) == 1
    got = capsys.readouterr()
    assert got.out == "" and got.err.count("\n") == 1


def test_what_libraries_print_is_no_part_of_the_json(model, monkeypatch, capsys):
    greeted = Talk.say
    monkeypatch.setattr(Talk, "say", lambda *args, **more: print("hello") or greeted(*args, **more))
    assert ask(model, "--json", "What?") == 0
    got = capsys.readouterr()
    assert json.loads(got.out)["answer_tokens"] == 4 and "hello\n" in got.err


def test_info_as_json(model, tmp_path, capsys):
    assert main(["info", model, "--json", "--freeze-prefix", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"] == model and told["reading_layers"] == [0, 3] and told["prefix_layers"] == [0, 1]
    assert told["backbone"]["layers"] == 8 and set(told["parameters"]) == {"language", "tower", "projector"}
    assert told["visual_tokens"] == 576 and told["kv_bytes_an_image"] == 1179648
    assert 0 < told["visual_flops"] < told["dense_visual_flops"]
    config = json.loads(open(f"{model}/config.json").read())
    del config["t2v_layers"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llava_llama"}))
    assert main(["info", str(tmp_path), "--json"]) == 0
    got = capsys.readouterr()
    assert json.loads(got.out)["variant"] == "dense" and "shown as dense" in got.err


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


def test_convert_into_small_files(model, tmp_path, capsys):
    assert main(["convert", model, str(tmp_path / "out"), "--to", "vica", "--max-shard-size", "8MB"]) == 0
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 2 and max(sizes) < 8.1e6
    states = [vica.load(path)[0].state_dict() for path in (model, tmp_path / "out")]
    assert all(torch.equal(states[0][name], weight) for name, weight in states[1].items())
    assert main(["convert", model, str(tmp_path / "other"), "--to", "vica", "--max-shard-size", "8"]) == 1
    assert "the largest size of a file is '8'" in capsys.readouterr().err
