"""Loading and identity: facts from headers, hashes, one sentence for everything wrong."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from backend.methods import METHODS
from backend.metrics import METRICS
from backend.model.identity import ModelError, content_of, find_model, resolve
from backend.model.loading import compute_dtype, load
from backend.spec import Calibration, ModelRef, RunSpec


def ref(folder):
    return ModelRef(id=str(folder))


def refused(folder, says):
    """Both the server's and the worker's way in give the same sentence."""
    with pytest.raises(ModelError, match=says) as caught:
        find_model(ref(folder))
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=says):
        load(ref(folder))


@pytest.fixture
def folder(llama_folder, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(llama_folder, tmp_path / "spoilt")


def test_facts_come_from_the_headers(llama_folder):
    facts = find_model(ref(llama_folder))
    model, _ = load(ref(llama_folder))
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert facts.weight_bytes == 2 * facts.parameters
    block = model.model.layers[0]
    matrices = [p for p in block.parameters() if p.dim() == 2]
    assert facts.linear_parameters == 3 * sum(p.numel() for p in matrices)
    assert facts.layer_bytes == 2 * sum(p.numel() for p in block.parameters())
    assert (facts.blocks, facts.context, facts.id) == (3, 256, str(llama_folder))
    assert len(facts.content) == 12


def test_loading_gives_an_inert_model_in_the_asked_dtype(llama_folder):
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load(ref(llama_folder), "cpu", dtype)
        assert not model.training
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert not any(p.requires_grad for p in model.parameters())
    stored = load_file(llama_folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    wide, _ = load(ref(llama_folder), "cpu", torch.float32)
    assert torch.equal(wide.model.layers[0].mlp.up_proj.weight, stored.float())
    assert tokenizer("hi")["input_ids"][0] == 256


def test_content_follows_the_files(folder):
    before = find_model(ref(folder)).content
    assert find_model(ref(folder)).content == before
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    after = find_model(ref(folder)).content
    assert after != before
    with pytest.raises(ModelError, match="have changed since the run was submitted"):
        load(ModelRef(id=str(folder), content=before))


def test_hub_blobs_are_named_by_their_digest(tmp_path):
    blob = tmp_path / "blobs" / "abc123"
    blob.parent.mkdir()
    blob.write_text("{}")
    (tmp_path / "config.json").symlink_to(blob)
    assert content_of(tmp_path / "config.json") == "abc123"


def test_no_folder_and_no_config(tmp_path):
    refused(tmp_path / "nowhere", "there is no folder .*nowhere")
    refused(tmp_path, "has no config.json, so it is not a Hugging Face model folder")


def test_broken_config(folder):
    (folder / "config.json").write_text("{not json")
    refused(folder, "config.json cannot be read as JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, "holds no JSON object")


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pickle files, which can run code when opened; convert them to safetensors")


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, r"has no \*.safetensors weights")


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_cut_off_safetensors(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "model.safetensors is not a (whole|readable) safetensors file")


def test_garbage_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"x" * 4000)
    refused(folder, "is not a readable safetensors file")


def test_missing_shard(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "lacks model-00002-of-00002.safetensors, which its index names")


def test_missing_tensors(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 of the model's tensors, model.layers.1.mlp.up_p"):
        load(ref(folder))


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_weights_that_are_not_finite_are_named(folder, value, kind):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.self_attn.k_proj.weight"][3, 4] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"model.layers.2.self_attn.k_proj.weight holds {kind}"):
        load(ref(folder))


def test_weights_beyond_fp16_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    load(ref(folder))
    with pytest.raises(ModelError, match=r"mlp.up_proj.weight holds infinite weights in float16"):
        load(ref(folder), dtype=torch.float16)


def test_a_tokenizer_of_another_model(folder):
    config = json.loads((folder / "tokenizer.json").read_text())
    config["added_tokens"].append({**config["added_tokens"][0], "id": 5000, "content": "<far>"})
    config["model"]["vocab"]["<far>"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not match the model: it gives ids up to 5000"):
        load(ref(folder))


def test_no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    refused(folder, "has no tokenizer")


def test_unreadable_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"the tokenizer in .* cannot be read"):
        load(ref(folder))


def test_unsupported_and_already_quantized_models(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    refused(folder, "'mamba' has no entry in the table of families")
    quantized = {**config, "quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(quantized))
    refused(folder, r"already quantized \(gptq\); give the 16-bit model")


def test_a_hub_id_without_the_network(monkeypatch, tmp_path):
    for name in ("nobody/nothing", "nobody/nothing@v1"):
        with pytest.raises(ModelError, match="is not in the local Hugging Face cache and the hub"):
            find_model(ModelRef(id=name))


@pytest.fixture
def hub_cache(monkeypatch, tmp_path, llama_folder):
    """A cache that holds org/tiny at a commit of branch main, laid out as the hub client does."""
    repo = tmp_path / "hub" / "models--org--tiny"
    snapshot = repo / "snapshots" / ("c0ffee" + "0" * 34)
    for folder in (repo / "refs", repo / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(snapshot.name)
    for number, path in enumerate(sorted(llama_folder.iterdir())):
        shutil.copy(path, repo / "blobs" / f"{number:040d}")
        (snapshot / path.name).symlink_to(repo / "blobs" / f"{number:040d}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


def test_a_cached_hub_model_needs_no_network(hub_cache, llama_folder):
    facts = find_model(ModelRef(id="org/tiny"))
    assert (facts.id, facts.folder) == ("org/tiny", hub_cache)
    assert facts.parameters == find_model(ref(llama_folder)).parameters
    assert find_model(ModelRef(id="org/tiny@main")).content == facts.content
    model, _ = load(ModelRef(id="org/tiny", content=facts.content))
    assert model.config.model_type == "llama"
    spec = resolve(RunSpec(model=ModelRef(id="org/tiny@main")))
    assert (spec.model.id, spec.model.revision) == ("org/tiny", "main")
    assert resolve(spec) == spec
    with pytest.raises(ModelError, match=r"org/tiny@v2 is not in the local Hugging Face cache"):
        find_model(ModelRef(id="org/tiny", revision="v2"))


def test_a_hub_model_cached_with_pickles_only(hub_cache):
    (hub_cache / "model.safetensors").rename(hub_cache / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle files"):
        find_model(ModelRef(id="org/tiny"))


def test_demo_outliers_are_another_model():
    plain = find_model(ModelRef(id="demo"))
    planted = find_model(ModelRef(id="demo-outliers"))
    assert plain.folder == planted.folder
    assert plain.content != planted.content


def test_a_32_bit_checkpoint_is_rounded_to_16_bits(make_folder):
    folder = make_folder("llama")
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert stored[name].dtype == torch.float32
    rounded, _ = load(ref(folder))
    assert torch.equal(rounded.get_parameter(name), stored[name].bfloat16().float())
    assert not torch.equal(rounded.get_parameter(name), stored[name])
    asked, _ = load(ModelRef(id=str(folder), dtype="float32"))
    assert torch.equal(asked.get_parameter(name), stored[name])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_16_bit_checkpoint_is_taken_as_it_is(make_folder, dtype):
    folder = make_folder("llama", dtype=dtype)
    model, _ = load(ref(folder))
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(model.get_parameter(name), value.float())


@pytest.mark.parametrize(
    ("device", "storage", "stored", "asked", "expected"),
    [
        ("cpu", "simulated", "bfloat16", "auto", torch.float32),
        ("cpu", "packed", "float16", "auto", torch.bfloat16),
        ("cuda", "simulated", "float16", "auto", torch.float16),
        ("cuda:1", "packed", "bfloat16", "auto", torch.bfloat16),
        ("cuda", "packed", "float32", "auto", torch.bfloat16),
        ("cpu", "packed", "bfloat16", "float32", torch.float32),
    ],
)
def test_compute_dtype(device, storage, stored, asked, expected):
    model = ModelRef(id="m", dtype=asked)
    assert compute_dtype(model, device, storage, {"dtype": stored}) == expected


def spec_of(folder, text, **knobs):
    metric = METRICS.build({"kind": "perplexity", "dataset": str(text), **knobs.pop("metric", {})})
    steps = (METHODS.build({"kind": "gptq"}),)
    return RunSpec(model=ref(folder), steps=steps, metrics=(metric,), **knobs)


def test_resolve_makes_everything_concrete_and_is_stable(llama_folder, text_file):
    calibration = Calibration(dataset=str(text_file), samples=1000, length=2048)
    spec = resolve(spec_of(llama_folder, text_file, calibration=calibration))
    assert spec.model.content == find_model(ref(llama_folder)).content
    assert spec.metrics[0].window == 256  # the tiny model's context
    assert spec.metrics[0].dataset == f"file:{text_file}#{spec.calibration.content}"
    assert (spec.calibration.length, spec.calibration.samples) == (256, 12001 // 256)
    assert resolve(spec) == spec
    assert resolve(spec_of(llama_folder, text_file, calibration=calibration)) == spec


def test_another_text_is_another_run(llama_folder, text_file):
    first = resolve(spec_of(llama_folder, text_file)).fingerprint()
    text_file.write_text(text_file.read_text() + "more")
    assert resolve(spec_of(llama_folder, text_file)).fingerprint() != first


def test_resolve_refuses_texts_and_windows_that_do_not_fit(llama_folder, text_file):
    text_file.write_text("too short")
    with pytest.raises(
        ValueError, match=r"perplexity: the text .* has 10 tokens, fewer than one wi"
    ):
        resolve(spec_of(llama_folder, text_file))
    with pytest.raises(ValueError, match="window 512 is longer than the 256 tokens"):
        resolve(spec_of(llama_folder, text_file, metric={"window": 512}))
    with pytest.raises(ValueError, match="unknown text 'wikitext3'"):
        resolve(spec_of(llama_folder, "wikitext3"))
    with pytest.raises(ValueError, match=r"cannot read the text .*gone.txt: No such file"):
        resolve(spec_of(llama_folder, text_file.parent / "gone.txt"))


def test_running_out_of_memory_is_not_blamed_on_the_files(folder, monkeypatch):
    def exhausted(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", exhausted)
    with pytest.raises(MemoryError):
        load(ref(folder))
