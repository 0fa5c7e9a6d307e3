"""Plans for the tests: those of published methods, and any plan at all."""

from hypothesis import strategies as st

from vica.plan.layer import Drop, LayerPlan
from vica.plan.vica import make_plan


def with_drops(plan: list[LayerPlan], drops: dict[int, Drop]) -> list[LayerPlan]:
    return [LayerPlan(p.visual, p.text_reads, p.prefix_attends, drops.get(i)) for i, p in enumerate(plan)]


def fastv(layers: int, k: int, r: float, rounding: str) -> list[LayerPlan]:
    rule = {"round": "round", "int": "down"}[rounding]
    return with_drops([LayerPlan()] * layers, {k: Drop(1 - r, "previous", rule)})


def pyramiddrop(layers: int, layer_list: list[int], image_token_ratio_list: list[float]) -> list[LayerPlan]:
    drops = {i: Drop(keep, "own", "down", renumber=True) for i, keep in zip(layer_list, image_token_ratio_list)}
    return with_drops([LayerPlan()] * layers, drops)


def vtw(layers: int, k: int, positions: str) -> list[LayerPlan]:
    return with_drops([LayerPlan()] * layers, {k: Drop(0, renumber=positions == "renumber")})


def shortv(layers: int, replaced_layers: list[int]) -> list[LayerPlan]:
    return [LayerPlan("read" if i in replaced_layers else "update") for i in range(layers)]


def vica_pyramiddrop(layers: int, t2v_layers, freeze_prefix: bool, pdrop_layers, ratios) -> list[LayerPlan]:
    drops = {i: Drop(keep, "own", "down") for i, keep in zip(pdrop_layers, ratios)}
    return with_drops(make_plan("accel", layers, t2v_layers, freeze_prefix), drops)


def visipruner_shallow(layers: int, first: int) -> list[LayerPlan]:
    """Text is blind in the first layers, though visual tokens see each other."""
    return [LayerPlan("update", text_reads=i >= first) for i in range(layers)]


@st.composite
def any_plan(draw, layers: int, drops: bool = True, ranked: bool = True) -> list[LayerPlan]:
    """Update, read and skip mixed, text blind or not, any prefix rule, drops by any rank and either position rule."""
    plan: list[LayerPlan] = []
    left = 1.0
    for i in range(layers):
        visual = draw(st.sampled_from(["update", "read", "skip"]))
        layer = LayerPlan(visual, draw(st.booleans()) or visual != "update", draw(st.booleans()))
        drop = None
        if drops and draw(st.integers(0, 2)) == 0:
            ranks = [None]
            if ranked:
                ranks += ["own"] * layer.reads + ["previous"] * (i > 0 and plan[-1].reads)
            rank = draw(st.sampled_from(ranks))
            keep = (
                left * draw(st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0])) if rank else draw(st.sampled_from([0.0, left]))
            )
            drop = Drop(keep, rank, draw(st.sampled_from(["round", "down"])), draw(st.booleans()))
            left = keep
        plan.append(LayerPlan(layer.visual, layer.text_reads, layer.prefix_attends, drop))
    return plan
