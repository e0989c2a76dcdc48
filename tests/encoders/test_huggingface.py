"""Bodies of transformers, against transformers alone."""

import json
import shutil
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.testing import assert_close

from lm_softmax.encoders import HuggingFaceEncoder

TEXTS = ["the cat saw the dog", "the dog saw the other cat", "a cat and a dog and the moon"]
BODIES = {
    "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 16},
    "llama": {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 12,
        "max_position_embeddings": 32,
    },
}
KINDS = pytest.mark.parametrize("kind", BODIES)


def tokenizer_of(kind):
    model, trainer = {
        "gpt2": (models.BPE(), trainers.BpeTrainer),
        "llama": (models.WordLevel(), trainers.WordLevelTrainer),
    }[kind]
    trainer = trainer(vocab_size=40, special_tokens=["</s>", "<pad>"], show_progress=False)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@pytest.fixture(scope="module", params=list(BODIES))
def pretrained(request, tmp_path_factory):
    """A folder with a language model, the model itself and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tokenizer_of(request.param)
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        **BODIES[request.param],
        vocab_size=tokenizer.get_vocab_size() + 3,  # rows beyond the tokenizer, as is usual
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # also the padding row, which starts as zeros
        model.get_input_embeddings().weight.normal_()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return str(folder), model, tokenizer


def ranking(tokenizer):
    """Original ids by frequency in the texts, a rank for each of them."""
    counts = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.int64)
    for text in TEXTS:
        counts += torch.bincount(torch.tensor(tokenizer.encode(text).ids), minlength=len(counts))
    return counts.argsort(descending=True, stable=True)


def test_ranked_ids_give_the_hidden_states_of_transformers_alone(pretrained):
    folder, model, tokenizer = pretrained
    original_ids = ranking(tokenizer)
    ranks = original_ids.argsort()
    assert not torch.equal(ranks, original_ids)
    encoder = HuggingFaceEncoder(len(original_ids), path=folder).eval()
    encoder.permute_embedding(original_ids)
    for text in TEXTS:
        ids = torch.tensor([tokenizer.encode(text).ids])
        with torch.no_grad():
            expected = model(ids, output_hidden_states=True).hidden_states[-1]
            hidden, _ = encoder(ranks[ids])
        assert_close(hidden, expected)
    assert encoder.embedding.weight.shape == (len(original_ids), 8)
    assert encoder.embedding.padding_idx is None


def test_a_vocabulary_may_be_smaller_and_have_specials_of_its_own(pretrained):
    folder, model, tokenizer = pretrained
    original_ids = ranking(tokenizer)[:5]
    original_ids[2] = -1
    encoder = HuggingFaceEncoder(5, path=folder)
    encoder.permute_embedding(original_ids)
    weight = model.get_input_embeddings().weight
    kept = original_ids >= 0
    assert torch.equal(encoder.embedding.weight[kept], weight[original_ids[kept]])
    assert_close(encoder.embedding.weight[2], weight.mean(0))
    encoder(torch.arange(5)[None])[0].square().sum().backward()
    assert encoder.embedding.weight.grad.any(-1).all()


def test_a_checkpoint_needs_no_folder(pretrained, tmp_path):
    folder, _, tokenizer = pretrained
    original_ids = ranking(tokenizer)
    encoder = HuggingFaceEncoder(len(original_ids), path=folder).eval()
    encoder.permute_embedding(original_ids)
    structure = json.loads(json.dumps(encoder.structure()))
    torch.save(encoder.state_dict(), tmp_path / "weights.pt")
    loaded = HuggingFaceEncoder(len(original_ids), **structure).eval()
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    tokens = torch.arange(6)[None]
    assert torch.equal(loaded(tokens)[0], encoder(tokens)[0])
    assert loaded.structure() == structure
    assert loaded.max_positions == encoder.max_positions
    assert loaded.embedding.padding_idx is None  # 1 was an id of the tokenizer


def test_a_folder_may_hold_more_than_the_body_has_options(pretrained, tmp_path):
    folder, model, _ = pretrained
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    extra = {"n_ctx": 16, "task_specific_params": {"text": {"a": 1}}, "output_past": True}
    extra |= {"_name_or_path": "org/name", "_num_labels": 2}
    (tmp_path / "config.json").write_text(json.dumps(config | extra))
    size = model.config.vocab_size
    encoder = HuggingFaceEncoder(size, path=str(tmp_path)).eval()
    encoder.permute_embedding(torch.arange(size))
    loaded = HuggingFaceEncoder(size, **encoder.structure()).eval()
    loaded.load_state_dict(encoder.state_dict())
    tokens = torch.arange(6)[None]
    assert torch.equal(loaded(tokens)[0], encoder(tokens)[0])


KERNELS = [
    {"attn_implementation": "org/kernel"},
    {"_attn_implementation": "paged|org/kernel@v1"},
    {"_attn_implementation_internal": "org/kernel"},
    {"experts_implementation": {"": "org/kernel"}},
    {"rope_scaling": {"_experts_implementation": "org/kernel"}},
]


@pytest.mark.parametrize("option", KERNELS)
def test_no_option_fetches_a_kernel_from_the_hub(option, pretrained, tmp_path):
    folder, model, _ = pretrained
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | option))
    for options in ({"config": BODIES["gpt2"] | option}, {"path": str(tmp_path)}):
        with pytest.raises(ValueError, match="is code on the hub") as caught:
            HuggingFaceEncoder(model.config.vocab_size, **options)
        assert "\n" not in str(caught.value)


def test_pretrained_weights_insist_on_original_ids(pretrained):
    folder, _, tokenizer = pretrained
    size = tokenizer.get_vocab_size()
    encoder = HuggingFaceEncoder(size, path=folder)
    with pytest.raises(ValueError, match="expect the ids of their own tokenizer"):
        encoder(torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=rf"\({size},\).*\({size - 1},\)"):
        encoder.permute_embedding(torch.arange(size - 1))
    with pytest.raises(ValueError, match=f"original id {size + 3} .* {size + 3} ids"):
        encoder.permute_embedding(torch.arange(size) + 4)


def test_pretrained_weights_take_torchs_default_dtype(pretrained, tmp_path):
    _, model, tokenizer = pretrained
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    model.float()
    encoder = HuggingFaceEncoder(tokenizer.get_vocab_size(), path=str(tmp_path))
    assert {value.dtype for value in encoder.parameters()} == {torch.float32}
    assert encoder.training
    assert encoder.body.training


@KINDS
def test_new_weights_have_the_vocabularys_size(kind):
    encoder = HuggingFaceEncoder(31, config=BODIES[kind])
    assert encoder.embedding.weight.shape == (31, 8)
    assert encoder.embedding.padding_idx is None
    assert encoder.hidden_size == 8
    assert encoder.max_positions == {"gpt2": 16, "llama": 32}[kind]
    assert "vocab_size" not in BODIES[kind]  # the caller's options are left alone


BERT = {
    "model_type": "bert",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}
T5 = {"model_type": "t5", "d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, "give path .* or config"),
        ({"path": "somewhere", "config": {}}, "one of the two"),
        ({"path": "no/such/folder"}, "'no/such/folder' is not a folder with a config.json"),
        ({"config": {"n_layer": 1}}, "names no model_type, but needs"),
        ({"config": {"model_type": "gtp2"}}, "gtp2.* such as gpt2"),
        ({"config": BODIES["gpt2"] | {"n_layers": 3}}, "'n_layers'.*nearest: n_layer,"),
        ({"config": BODIES["gpt2"] | {"_attn_implementation": "eager"}}, "'_attn_impl.*no option"),
        ({"config": BODIES["gpt2"] | {"n_head": 3}}, "makes no gpt2 body: .*divisible.* 8 .* 3"),
        ({"config": BODIES["gpt2"] | {"n_layer": "two"}}, "makes no gpt2 body: .*n_layer"),
        ({"config": BODIES["gpt2"] | {"vocab_size": 30}}, "vocab_size=30, the data has 31"),
        ({"config": BERT}, "a bert body is not causal"),
        ({"config": T5}, "T5Model is not a causal body"),
    ],
)
def test_refuses_bodies_that_cannot_be(options, shown):
    with pytest.raises(ValueError, match=shown) as caught:
        HuggingFaceEncoder(31, **options)
    assert "\n" not in str(caught.value)


def test_a_type_that_becomes_causal_is_accepted():
    encoder = HuggingFaceEncoder(31, config=BERT | {"is_decoder": True})
    assert encoder.hidden_size == 8


@pytest.mark.parametrize("broken", ["no_weights", "pickled_weights", "lacking_weights", "no_json"])
def test_refuses_folders_without_the_whole_body(broken, pretrained, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, model, _ = pretrained
    model.config.save_pretrained(tmp_path)
    weights = load_file(f"{folder}/model.safetensors")
    if broken == "pickled_weights":
        torch.save(weights, tmp_path / "pytorch_model.bin")
    if broken == "lacking_weights":
        lacking = {name: value for name, value in weights.items() if "layer_norm" not in name}
        lacking = {name: value for name, value in lacking.items() if ".ln_1." not in name}
        lacking = {name: value for name, value in lacking.items() if "layernorm" not in name}
        save_file(lacking, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if broken == "no_json":
        (tmp_path / "config.json").write_text("{")
    shown = {"lacking_weights": r"lack [24] of the body's parameters"}.get(broken, "cannot load")
    with pytest.raises(ValueError, match=shown) as caught:
        HuggingFaceEncoder(10, path=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_names_the_extra_where_transformers_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "lm_softmax\[hf\]"') as caught:
        HuggingFaceEncoder(10, config=BODIES["gpt2"])
    assert "\n" not in str(caught.value)


def test_a_body_without_a_cache_of_keys_and_values_is_fed_its_tokens_again():
    config = {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1, "state_size": 2}
    encoder = HuggingFaceEncoder(23, config=config).eval()
    tokens = torch.randint(23, (2, 6))
    cache = None
    for token in tokens.split(1, 1):
        with torch.no_grad():
            hidden, cache = encoder.continue_from(token, cache)
    cache = encoder.select_rows(cache, torch.tensor([1]))
    with torch.no_grad():
        assert_close(hidden, encoder(tokens)[0][:, -1])
        hidden, _ = encoder.continue_from(torch.tensor([[3]]), cache)
        assert_close(hidden, encoder(torch.cat([tokens[1:], torch.tensor([[3]])], 1))[0][:, -1])
