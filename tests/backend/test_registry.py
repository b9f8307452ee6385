"""Parts, registries, recipe text and run identity."""

from __future__ import annotations

import json

import pytest

from backend import recipes
from backend.formats import FORMATS
from backend.methods import METHODS
from backend.metrics import METRICS
from backend.registry import Part, Registry
from backend.spec import ModelRef, RunSpec

REGISTRIES = {"format": FORMATS, "method": METHODS, "metric": METRICS}
EVERY = [(noun, kind) for noun, registry in REGISTRIES.items() for kind in sorted(registry.load())]


@pytest.mark.parametrize("noun", REGISTRIES)
def test_every_file_imports(noun):
    assert REGISTRIES[noun].load(), f"no {noun} was found"
    assert not REGISTRIES[noun].broken


@pytest.mark.parametrize(("noun", "kind"), EVERY)
def test_every_part_documents_itself(noun, kind):
    cls = REGISTRIES[noun].load()[kind]
    assert len(cls.summary()) > 10
    for name, field in cls.model_fields.items():
        if name != "format":
            assert field.description, f"{kind}.{name} has no help text"


@pytest.mark.parametrize(("noun", "kind"), EVERY)
def test_every_part_survives_json(noun, kind):
    registry = REGISTRIES[noun]
    part = registry.build({"kind": kind})
    again = registry.build(json.loads(json.dumps(part.data())))
    assert again == part
    assert again.digest() == part.digest()


@pytest.mark.parametrize("kind", sorted(METHODS.load()))
def test_every_method_survives_text(kind):
    steps = (METHODS.build({"kind": kind}),)
    assert recipes.parse(recipes.render(steps)) == steps


@pytest.mark.parametrize("name", sorted(recipes.presets()))
def test_every_preset_parses_and_round_trips(name):
    steps = recipes.parse(name)
    assert steps
    assert recipes.parse(recipes.render(steps)) == steps


@pytest.mark.parametrize(
    "text",
    [
        "rtn(bits=4,group=64)",
        "gptq(bits=3,group=0,act_order=true,damping=0.05)",
        "smoothquant(alpha=0.55)+gptq(bits=4,group=128,act_order=true)+activations(bits=8)",
        "rtn(bits=8,symmetric=true,convention=full)",
    ],
)
def test_canonical_text_is_its_own_canonical_text(text):
    assert recipes.render(recipes.parse(text)) == text


def test_format_fields_come_first_and_defaults_written_stay():
    assert recipes.render(recipes.parse("gptq(damping=0.01, group=0, bits=4)")) == (
        "gptq(bits=4,group=0,damping=0.01)"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gptqq(bits=4)", ["gptqq", "did you mean 'gptq'"]),
        ("gptq(bit=4)", ["bit", "did you mean 'bits'"]),
        ("gptq(bits=17)", ["bits", "17"]),
        ("gptq(bits=4", ["expected"]),
        ("gptq(bits=4))", ["expected"]),
        ("rtn(bits=4,bits=3)", ["twice"]),
        ("rtn(format=inty(bits=4))", ["inty", "did you mean 'int'"]),
        ("rtn(bits=true)", ["bits"]),
        ("rtn(bits=4)+", ["more"]),
        ("!?", ["unknown recipe"]),
    ],
)
def test_bad_recipes_get_one_sentence(text, words):
    with pytest.raises(ValueError) as error:
        recipes.parse(text)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_two_classes_of_one_kind_are_an_error():
    registry: Registry[Part] = Registry("backend.formats", "thing")

    class First(Part):
        """First."""

        kind = "same"

    class Second(Part):
        """Second."""

        kind = "same"

    registry.register(First)
    with pytest.raises(ValueError, match="already"):
        registry.register(Second)


def spec(recipe: str, **more) -> RunSpec:
    return RunSpec(
        model=ModelRef(id="demo", content="0123456789ab"), steps=recipes.parse(recipe), **more
    )


def test_the_artifact_depends_on_what_quantization_does_and_on_nothing_else():
    base = spec("gptq(bits=4)")
    assert base.artifact_id() == spec("gptq(bits=4,group=0)").artifact_id()
    assert base.artifact_id() != spec("gptq(bits=3)").artifact_id()
    assert base.artifact_id() != spec("gptq(bits=4)", seed=1).artifact_id()
    assert base.artifact_id() != spec("gptq(bits=4)", storage="packed").artifact_id()
    measured = spec("gptq(bits=4)", metrics=({"kind": "size"},))
    assert measured.artifact_id() == base.artifact_id()
    assert measured.fingerprint() != base.fingerprint()


def test_calibration_matters_only_to_methods_that_look_at_it():
    other = {"calibration": {"dataset": "demo", "samples": 7}}
    assert spec("rtn(bits=4)", **other).artifact_id() == spec("rtn(bits=4)").artifact_id()
    assert spec("gptq(bits=4)", **other).artifact_id() != spec("gptq(bits=4)").artifact_id()


def test_a_spec_survives_json():
    original = spec(
        "smoothquant(alpha=0.5)+rtn(bits=8)+activations(bits=8)", metrics=({"kind": "size"},)
    )
    again = RunSpec.model_validate(json.loads(original.model_dump_json()))
    assert again.fingerprint() == original.fingerprint()
    assert again == original


def test_speed_of_a_simulated_model_is_refused():
    with pytest.raises(ValueError, match="packed"):
        spec("rtn(bits=4)", metrics=({"kind": "speed"},))
    assert spec("baseline", metrics=({"kind": "speed"},)).stages() == ["speed"]
