"""Tests the recipe in small, beside its world: the base models, the score of a model, and the table of the runs."""

import json
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import vica
from scripts.toy import base, claim, evaluate, layers, patches, tower
from scripts.toy.learning import learn
from tests.builders import assert_close
from tests.engines import answer, seeing_model
from tests.training import arguments
from vica.plan.config import ViCAConfig
from vica.toy.captions import caption
from vica.toy.score import read_questions
from vica.toy.world import draw, random_scene
from vica.toy.write import write
from vica.train.run import main as train

CPU = ["--device", "cpu"]
STEPS = ["--tower-steps", "2", "--language-steps", "2", "--pictures", "8", "--batch", "8"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Makes a world, and beside it the base models of training."""
    root = tmp_path_factory.mktemp("recipe")
    write(root / "world", 24, 4, seed=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "SCENES", 30)
        assert base.main(["--out", str(root), *STEPS, *CPU]) == 0
    return root


# --- the base -----------------------------------------------------------------------------------------------------


def test_transformers_reads_the_base(root):
    tokenizer = AutoTokenizer.from_pretrained(root / "llm")
    language, of_language = LlamaForCausalLM.from_pretrained(root / "llm", output_loading_info=True)
    seeing, of_tower = CLIPVisionModel.from_pretrained(root / "tower", output_loading_info=True)
    assert not any(of_language.values()) and not any(of_tower.values())
    special = [getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")]
    assert special == [getattr(language.config, f"{name}_token_id") for name in ("bos", "eos", "pad")]
    assert len(tokenizer) == language.config.vocab_size
    text = "What colour is the star? red 图中有几个圆环？"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    with Image.open(root / "world/images/train/000000.png") as picture:
        pixels = CLIPImageProcessorPil.from_pretrained(root / "tower")(picture, return_tensors="pt").pixel_values
    with torch.no_grad():
        assert torch.isfinite(seeing(pixels).last_hidden_state).all()
        assert torch.isfinite(language(**tokenizer(text, return_tensors="pt")).logits).all()


def test_training_starts_from_the_base(root, tmp_path):
    assert train(arguments(root, tmp_path / "out", max_steps=1)) == 0
    model, processor = vica.load(tmp_path / "out", device="cpu")
    assert (model.config.text_config.num_hidden_layers, processor.image_processor.crop_size["height"]) == (12, 112)


def test_families_are_twins_with_their_captions(monkeypatch):
    pictures, captions, scenes = [], [], []

    def drawn(scene):
        scenes.append(scene)
        pictures.append(np.asarray(draw(scene)).transpose(2, 0, 1))
        return draw(scene)

    def told(scene, rng):
        assert scene == scenes[len(captions)]
        captions.append(f"{caption(scene, rng)}</s>")
        return captions[-1].removesuffix("</s>")

    alone = [tower.draw_family(1, number) for number in range(6)]
    with monkeypatch.context() as patch:
        patch.setattr(tower, "draw", drawn)
        patch.setattr(tower, "caption", told)
        family, said = tower.draw_family(1, 4)
    assert (family == np.stack(pictures)).all() and (family == alone[4][0]).all() and said == captions == alone[4][1]
    assert len({*scenes}) == 4 and all(len(scene.things) == len(scenes[0].things) for scene in scenes)
    pixels, captions = tower.draw_families(6, 1)
    assert (pixels.numpy() == np.concatenate([one for one, _ in alone])).all()
    assert captions == sum((said for _, said in alone), [])


def test_the_tower_sees_families_with_their_captions(root, monkeypatch):
    """Checks that families of pictures come as the saved image processor gives them, each with its own caption, and
    that all of a batch are compared if it is no larger than a group."""
    seen = {}

    def likeness(model, ids, pixels, pad):
        seen.update(ids=ids, pixels=pixels, pad=pad)
        return torch.zeros(*ids.shape[:2], ids.shape[1], requires_grad=True)

    monkeypatch.setattr(tower, "likeness", likeness)
    monkeypatch.setattr(tower, "learn", lambda model, loss, *_: loss())
    tokenizer, (pictures, captions) = AutoTokenizer.from_pretrained(root / "llm"), tower.draw_families(6, 0)
    for batch, groups in ((64, 1), (130, 2)):
        tower.contrastive(tokenizer, pictures, captions, batch, 1, torch.device("cpu"))
        assert seen["ids"].shape[:2] == (groups, 64) and seen["pad"] == tokenizer.pad_token_id
        processor = CLIPImageProcessorPil.from_pretrained(root / "tower")
        processed = processor([Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pictures]).pixel_values
        processed = torch.from_numpy(np.stack(processed))
        places = torch.cdist(seen["pixels"].flatten(1), processed.flatten(1)).argmin(1)
        assert_close(seen["pixels"], processed[places])
        families = places.view(-1, 4)
        assert torch.equal(families, families[:, :1] + torch.arange(4)) and len(families.unique()) > 12
        pads = (seen["ids"] == tokenizer.pad_token_id).int().argmax(-1).flatten()
        read = [tokenizer.decode(row[:pad]) for row, pad in zip(seen["ids"].flatten(0, 1), pads)]
        assert read == [f"<s>{captions[place]}" for place in places]


def test_a_words_similarity_is_that_of_its_best_patch(root):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(root / "llm")
    model, (pictures, captions) = tower.build(tokenizer).eval(), tower.draw_families(2, 0)
    pad = tokenizer.pad_token_id
    ids = tokenizer(captions, padding="max_length", max_length=tower.TOKENS, return_tensors="pt").input_ids
    pixels = pictures.float() / 255
    with torch.no_grad():
        scores = tower.likeness(model, ids.view(2, 4, -1), pixels, pad)
        for group, text, picture in ((0, 0, 0), (0, 1, 3), (1, 2, 0)):
            words = model.text_model(input_ids=ids[4 * group + text][None]).last_hidden_state[0]
            words = model.text_projection(words[ids[4 * group + text] != pad])
            hidden = model.vision_model(pixel_values=pixels[4 * group + picture][None]).last_hidden_state[0, 1:]
            patches = model.visual_projection(model.vision_model.post_layernorm(hidden))
            each = torch.cosine_similarity(words[:, None], patches[None], dim=-1).max(1).values
            assert scores[group, text, picture].item() == pytest.approx(each.mean().item(), abs=1e-5)
    own, mixed = 9.0 * torch.eye(4), torch.randn(4, 4)
    assert tower.pairing_loss(own[None]) < 0.01 < tower.pairing_loss(own.roll(1, 0)[None])
    both = (mixed.log_softmax(0).diag().mean() + mixed.log_softmax(1).diag().mean()) / -2
    assert tower.pairing_loss(torch.stack([mixed, mixed])).item() == pytest.approx(both.item(), abs=1e-5)


def test_an_existing_part_is_kept(root, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "SCENES", 30)
    out = tmp_path / "base"
    assert base.main(["--out", str(out), *STEPS, *CPU, "--only", "llm"]) == 0
    assert [path.name for path in out.iterdir()] == ["llm"]
    made = (out / "llm/model.safetensors").stat().st_mtime_ns
    assert base.main(["--out", str(out), *STEPS, *CPU]) == 0
    assert (out / "llm/model.safetensors").stat().st_mtime_ns == made
    for name in ("llm", "tower"):  # in any order, by one command or two
        ours, theirs = (load_file(folder / name / "model.safetensors") for folder in (out, root))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# --- what a tower's patches tell ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, fails",
    [
        ("agree in each", "linear"),
        ("agree across", "linear"),
        pytest.param("sign of the first", "set", marks=pytest.mark.slow),
    ],
)
def test_each_network_reads_only_its_kind_of_relation(name, fails):
    """Uses patches of signs, and asks whether the two of a patch agree, whether two patches agree, or for the first
    one's sign."""
    signs = torch.randint(2, (2, 4000, 2), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    both = signs[:, :, None].expand(-1, -1, 4, -1)
    seen = both if name == "agree in each" else signs.repeat(1, 1, 2)[..., None]  # one, other, one, other
    told = (signs[..., 0] > 0 if name == "sign of the first" else signs[..., 0] == signs[..., 1]).long()
    score = {n: patches.right(make, seen[0], told[0], seen[1], told[1], 2) for n, make in patches.NETWORKS.items()}
    assert {n for n in score if score[n] < 80} == {fails} and sum(score[n] > 99 for n in score) == 2, score


def test_the_four_patches_are_those_of_the_thing(root):
    """Uses a tower whose patches see only themselves."""
    model = CLIPVisionModel.from_pretrained(root / "tower").eval()
    for name, parameter in model.named_parameters():
        if ".out_proj." in name:
            parameter.data.zero_()
    (seen, things), (unseen, _) = patches.look(model, "a", 400), patches.look(model, "b", 1)
    assert seen.shape == (len(things), 4, unseen.shape[-1])
    labels = torch.tensor([patches.ASKED["colour"].index(thing.colour) for thing in things])
    half = len(things) // 2
    assert patches.right(patches.NETWORKS["together"], seen[:half], labels[:half], seen[half:], labels[half:], 7) > 90


def test_patches_are_the_decoders_inputs(root):
    """Compares the first thing of the first scene with the model's own tower at LLaVA's layer."""
    model, things = CLIPVisionModel.from_pretrained(root / "tower").eval(), random_scene(random.Random("a")).things
    pixels = CLIPImageProcessorPil.from_pretrained(root / "tower")(
        draw(random_scene(random.Random("a"))), return_tensors="pt"
    ).pixel_values
    config = ViCAConfig(vision_config=model.config)
    with torch.no_grad():
        states = model(pixels, output_hidden_states=True).hidden_states[config.mm_vision_select_layer][0, 1:]
    seen, told = patches.look(model, "a", 1)
    assert told == list(things)
    assert_close(seen[0], states[patches.four(things[0])], 1e-6)


def test_patches_from_the_command_line(root, monkeypatch, capsys):
    monkeypatch.setattr(patches, "STEPS", 2)
    assert patches.main([str(root / "tower"), "--pictures", "12", *CPU]) == 0
    heading, _, *rows = capsys.readouterr().out.splitlines()
    assert heading.split() == ["right,", "%", "linear", "set", "together"]
    assert [row.split()[0] for row in rows] == ["shape", "colour", "size"]


# --- the layers ---------------------------------------------------------------------------------------------------


def test_text_after_a_caption_sees_it_only_in_reading_layers(root):
    tokenizer, plain = AutoTokenizer.from_pretrained(root / "llm"), LlamaForCausalLM.from_pretrained(root / "llm")
    reader = layers.Reader(plain.eval(), tokenizer, range(6))
    asked, own = [layers.prepare(tokenizer, number) for number in range(6)], []
    for ids, answers, _ in asked:
        with torch.no_grad():
            own.append(-plain(ids[None], labels=torch.where(answers, ids, -100)[None]).loss * answers.sum())
    assert reader(range(12)).likelihood == pytest.approx(torch.stack(own).mean().item(), abs=1e-4)
    before = {reading: reader(reading).likelihood for reading in ((), (3,))}
    captions = torch.nn.utils.rnn.pad_sequence([caption for *_, caption in asked], batch_first=True)
    reader.ids = torch.where(captions, 77, reader.ids)
    assert reader(()).likelihood == pytest.approx(before[()], abs=1e-6)
    assert abs(reader((3,)).likelihood - before[(3,)]) > 1e-5


def test_the_caption_mask_covers_the_caption(root):
    tokenizer = AutoTokenizer.from_pretrained(root / "llm")
    for number in range(20):
        ids, answer, told = layers.prepare(tokenizer, number)
        scene = layers.random_scene(rng := random.Random(f"layers {number}"))
        assert tokenizer.decode(ids[told]).strip() == caption(scene, rng)
        assert tokenizer.decode(ids[answer]).strip().endswith("</s>")


def test_the_search_for_layers():
    class Stand:
        depth = 5

        def __init__(self, right):
            self.right = right

        def __call__(self, reading):
            return layers.Score(self.right, sum({1: 3.0, 4: 2.0}.get(layer, -1.0) for layer in reading))

    rows = [re.split("  +", line) for line in layers.search(Stand(10.0), Stand(20.0), 2).splitlines()]
    assert [row[0] for row in rows[2:5]] == ["all", "none", "[1, 4]"] and len(rows) == 14
    assert {row[1] for row in rows[2:]} == {"20.0"}  # on the other questions


def test_layers_from_the_command_line(root, capsys):
    assert layers.main([str(root / "llm"), "--questions", "2", "--count", "1", *CPU]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 14


@pytest.mark.parametrize(
    "program, part, flags, told",
    [
        (layers, "tower", [], "{folder} holds no language model"),
        (layers, "llm", ["--questions", "0"], "--questions is 0; it must be 1 at least"),
        (layers, "llm", ["--count", "0"], "--count is 0; it must be 1 at least"),
        (layers, "llm", ["--count", "13"], "--count is 13, but the model has 12 layers"),
        (patches, "llm", [], "{folder} holds no tower"),
        (patches, "", [], "{folder} holds no tower"),
        (patches, "tower", ["--pictures", "0"], "--pictures is 0; it must be 1 at least"),
    ],
)
def test_wrong_folders_and_counts_are_errors(program, part, flags, told, root, capsys):
    assert program.main([str(root / part), *flags, *CPU]) == 1
    assert capsys.readouterr().err == f"{program.__name__}: {told.format(folder=root / part)}\n"


def test_existing_parts_are_kept_and_reported(root, capsys):
    before = (root / "tower/model.safetensors").read_bytes()
    assert base.main(["--out", str(root), "--only", "tower", "--seed", "5", *STEPS, *CPU]) == 0
    assert capsys.readouterr().out == f"{root / 'tower'} is there already\n"
    assert (root / "tower/model.safetensors").read_bytes() == before


def test_learning(capsys):
    torch.manual_seed(0)
    model, rows = torch.nn.Linear(3, 1), torch.randn(16, 3)

    def loss() -> torch.Tensor:
        return (model(rows) - rows.sum(1, keepdim=True)).square().mean()

    before = loss().item()
    assert not learn(model, loss, 100, 0.1, "sum", torch.device("cpu")).training
    assert loss().item() < before / 100
    assert re.match(r"sum: loss 0\.0\d\d after 100 steps", capsys.readouterr().out)


@pytest.mark.parametrize(
    "option, value, told",
    [
        ("--tower-steps", 0, "--tower-steps is 0; it must be 1 at least"),
        ("--pictures", 3, "--pictures is 3; it must be 4 at least"),
        ("--device", "tpu", "device is 'tpu'"),
    ],
)
def test_mistakes_of_the_base_are_reported_at_once(tmp_path, capsys, monkeypatch, option, value, told):
    monkeypatch.setattr(base, "language", lambda *_: pytest.fail("begun"))
    assert base.main(["--out", str(tmp_path / "base"), option, str(value)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("scripts.toy.base: ") and told in line and not (tmp_path / "base").exists()


# --- the score ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(root, tmp_path_factory):
    """Makes a model, and a world that accepts two in three of its answers as right."""
    folder = tmp_path_factory.mktemp("asked")
    model, processor = seeing_model()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    questions = read_questions(root / "world/test.jsonl")
    for place, question in enumerate(questions):
        inputs = processor.ask(question["text"], [root / "world/images" / question["image"]])
        said = processor.decode(answer(model, inputs, evaluate.ANSWER), skip_special_tokens=True)
        question["answer"] = said if place % 3 else f"{said} not"
    assert len({question["answer"] for question in questions}) > len(questions) * 0.8
    (folder / "images").symlink_to(root / "world/images")
    (folder / "test.jsonl").write_text("".join(f"{json.dumps(question)}\n" for question in questions))
    return folder


def score(folder, *options) -> int:
    return evaluate.main([str(folder / "model"), "--world", str(folder), *options, *CPU])


@pytest.mark.parametrize("limit", [None, 7])
def test_right_answers_are_counted_by_kind(asked, tmp_path, capsys, limit):
    assert score(asked, "--json", str(tmp_path / "score.json"), *(["--limit", str(limit)] if limit else [])) == 0
    kinds = [question["kind"] for question in read_questions(asked / "test.jsonl")][:limit]
    right, of = Counter(kind for place, kind in enumerate(kinds) if place % 3), Counter(kinds)
    counts = {kind: [right[kind], of[kind]] for kind in of} | {"all": [right.total(), of.total()]}
    assert json.loads((tmp_path / "score.json").read_text()) == counts
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 4]
    shown = {kind: [int(right), int(of), share] for kind, right, of, share in rows if kind in counts}
    assert shown == {kind: [right, of, f"{100 * right / of:.1f}"] for kind, (right, of) in counts.items()}


def test_an_unreadable_picture_stops_the_score(asked, tmp_path, capsys):
    questions = read_questions(asked / "test.jsonl")
    questions[3]["image"] = "test/nowhere.png"
    for name in ("model", "images"):
        (tmp_path / name).symlink_to(asked / name)
    (tmp_path / "test.jsonl").write_text("".join(f"{json.dumps(question)}\n" for question in questions))
    assert score(tmp_path, "--json", str(tmp_path / "score.json")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("scripts.toy.evaluate: a question was not answered: ") and "nowhere.png" in line
    assert not (tmp_path / "score.json").exists()


@pytest.mark.parametrize(
    "options, told",
    [
        (["--limit", "0"], "--limit is 0; it must be 1 at least"),
        (["--limit", "-1"], "--limit is -1"),
        (["--limit", "1", "--json", "no/folder/score.json"], "no/folder/score.json"),
    ],
)
def test_wrong_flags_are_errors(asked, capsys, options, told):
    assert score(asked, *options) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("scripts.toy.evaluate: ") and told in line


def test_a_missing_world_is_an_error(asked, tmp_path, capsys):
    (tmp_path / "model").symlink_to(asked / "model")
    assert score(tmp_path) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("scripts.toy.evaluate: ") and "test.jsonl" in line


# --- the claim ----------------------------------------------------------------------------------------------------

# Name and seed, layers, right answers out of 10 and out of 30, seconds.
RUNS = [
    ("dense-0", [], (6, 18), 100.0),
    ("dense-1", [], (8, 24), 201.0),
    ("vica-0", [1], (5, 15), 20.0),
    ("vica-1", [1], (6, 21), 24.0),
    ("blind-0", [], (1, 9), 9.6),
]
# 4 visual tokens. FLOPs of a layer's linear maps for each: keys and values 128, queries and output 256, the rest 768;
# the attention of a dense layer: 10 pairs of 32. So dense is 4 x 4928, one T2V layer 512, which is 2.6%.
TABLE = """\
| % | dense | vica | blind |
| --- | --- | --- | --- |
| word | 70.0 ± 14.1 | 55.0 ± 7.1 | 10.0 |
| all | 70.0 ± 14.1 | 60.0 ± 14.1 | 30.0 |
| of dense's accuracy | 100.0% | 85.7% | 42.9% |
| of dense's visual FLOPs | 100.0% | 2.6% | 0.0% |
| training, s | 150 | 22 | 10 |
| seeds | 2 | 2 | 1 |
"""


@pytest.fixture
def runs(tmp_path):
    for name, reading, (word, every), seconds in RUNS:
        config = vica.ViCAConfig(
            text_config=dict(
                hidden_size=8, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16, num_hidden_layers=4
            ),
            vision_config=dict(image_size=28, patch_size=14),
            variant="dense" if name.startswith("dense") else "accel",
            t2v_layers=reading,
        )
        config.save_pretrained(tmp_path / name / "model")
        # A run stopped after two steps, which took a quarter of the time, and resumed; the last entry covers only the
        # rest.
        history = [
            dict(loss=2.5, step=2, samples_per_s=2 * 16 / (seconds / 4)),
            dict(loss=0.5, step=8, samples_per_s=6 * 16 / (seconds * 3 / 4)),
            dict(train_runtime=seconds * 3 / 4, step=8),
        ]
        state = dict(log_history=history, train_batch_size=16)
        (tmp_path / name / "model/trainer_state.json").write_text(json.dumps(state))
        (tmp_path / name / "score.json").write_text(json.dumps(dict(word=[word, 10], all=[every, 30])))
    return tmp_path


def test_the_claims_numbers(runs):
    read = claim.read_runs(runs)
    assert [f"{run['name']}-{run['seed']}" for run in read] == sorted(name for name, *_ in RUNS)
    assert [run["t2v_layers"] for run in read] == [[], None, None, [1], [1]]
    assert [run["visual_flops"] for run in read] == [0, 19712, 19712, 512, 512]
    assert {(run["steps"], run["loss"]) for run in read} == {(8, 0.5)}
    assert claim.markdown(read) == TABLE
    alone = claim.markdown([run for run in read if run["name"] == "vica"])
    assert "of dense" not in alone and "| all | 60.0 ± 14.1 |" in alone


def test_the_claims_files(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert claim.main([str(runs), "--out", str(tmp_path / "claim")]) == 0
    assert capsys.readouterr().out.rstrip() == TABLE.rstrip() == (tmp_path / "claim/claim.md").read_text().rstrip()
    assert json.loads((tmp_path / "claim/claim.json").read_text()) == claim.read_runs(runs)
    with Image.open(tmp_path / "claim/claim.png") as plot:
        assert len(plot.convert("RGB").getcolors(2**24)) > 3


@pytest.mark.parametrize(
    "missing, told",
    [
        ("", "nowhere holds no NAME-SEED/score.json"),
        ("dense-0/model/config.json", "dense-0/model holds no config.json"),
    ],
)
def test_missing_runs_are_named(runs, tmp_path, capsys, missing, told):
    if missing:
        (runs / missing).unlink()
    assert claim.main([str(runs if missing else runs / "nowhere"), "--out", str(tmp_path / "claim")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("scripts.toy.claim: ") and told in line and not (tmp_path / "claim").exists()


@pytest.mark.parametrize("name", ["old", "vica-old", "-0"])
def test_a_folder_that_is_no_run_is_named(runs, tmp_path, capsys, name):
    (runs / "vica-1").rename(runs / name)
    assert claim.main([str(runs), "--out", str(tmp_path / "claim")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("scripts.toy.claim: ") and f"{runs / name} holds a score.json, but its name" in line
