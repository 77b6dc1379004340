"""Architectures of Hugging Face transformers, made small with random weights, against the slow oracle.

    python -m benchmarks.zoo [--tasks causal images ...] [--only llama vit ...]

Each model that computes its own loss is tried in float64: quantities of individual gradients next to a loop over
samples, then a diagonal of the GGN and Kronecker factors in one pass each, for which it counts whether they are
given. Writes benchmarks/results/zoo.json and a table of docs/models.md. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import packext as px
from benchmarks.summary import ROOT, between
from packext import testing

RESULTS = ROOT / "benchmarks" / "results" / "zoo.json"
N, T, V, CLASSES = 3, 6, 17, 4

#: Largest model that is tried, and the seconds that one may take.
MOST, SECONDS = 5_000_000, 120

#: What is set where a configuration has an entry of that name with a value of that type.
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "embed_dim", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(("word_embed_proj_dim", "attention_dim", "emb_dim", "d_embed", "attention_hidden_size"), 32),
    **dict.fromkeys(("n_layer", "num_hidden_layers", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "depth", "num_hidden_groups"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_global_key_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "kv_n_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "d_ff", "hidden_dim", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 36),
    **dict.fromkeys(("n_inner", "d_inner", "ffn_hidden_size", "ffn_intermediate_size", "ffn_hidden_dim"), 36),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 20),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), T + 6),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "n_groups", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "v_head_dim", "head_dim", "d_kv", "attention_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "rotary_emb_dim", "state_size"), 4),
    **dict.fromkeys(("mamba_d_state", "time_step_rank", "attention_window", "sliding_window", "adapter_size"), 4),
    "image_size": 32,
    "patch_size": 4,
    "vocab_size": V,
    "type_vocab_size": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "window_size": 2,
    "per_layer_input_size": 0,
}

#: What every configuration is told.
ALWAYS = {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0, "num_labels": CLASSES,
    "use_cache": False, "experts_implementation": "eager", "classifier_dropout": 0.0,
    "ctc_loss_reduction": "mean",
}  # fmt: skip

#: Lists in configurations, one entry for each stage, get this in every place.
STAGES = {"depths": 1, "num_layers": 1, "num_heads": 2, "num_attention_heads": 2, "hidden_sizes": 16, "embed_dims": 16}

#: What configurations of a type need besides, for sizes that agree with each other.
PARTICULAR: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "xmod": {"default_language": "en_XX"},
    "swin": {"image_size": 64},
    "donut-swin": {"image_size": 64},
    "lilt": {"hidden_size": 48},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "esmc": {"num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "local_attn_chunk_length": 3},
    "mobilevitv2": {"image_size": 128},
    "whisper": {"max_source_positions": 12, "num_mel_bins": 8},
    "audio-spectrogram-transformer": {"num_mel_bins": 16, "max_length": 24},
}

#: What is switched off: random numbers, which a sample by itself would draw anew.
RANDOM = (
    "dropout",
    "pdrop",
    "drop",
    "drop_rate",
    "dropout_rate",
    "dropout_prob",
    "layerdrop",
    "jitter_noise",
    "time_prob",
    "feature_prob",
)

TASKS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequences": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "images": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "texts": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "tokens": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "questions": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "choices": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "frames": "MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING_NAMES",
    "speech": "MODEL_FOR_CTC_MAPPING_NAMES",
}


#: Outcomes of models that tell nothing.
UNTRIED = ("not built", "not float64", "not finite", "large", "slow")


@dataclass
class Found:
    """What became of one architecture.

    Attributes:
        task: of `TASKS`.
        name: of the class.
        outcome: "right", "wrong", "crashed", "refused", "coupled, refused", "coupled, not refused"; of models that
            cannot be tried "not built" (no small configuration), "not float64", "not finite", "large", "slow".
        detail: an error's words.
        curvature: quantities of curvature and what became of each.
    """

    task: str
    name: str
    outcome: str
    detail: str = ""
    curvature: dict[str, str] | None = None


class Late(Exception):
    """A model has had its time."""


def small(config_class: Any) -> Any:
    """A configuration as small as the entries that are known allow."""
    base = config_class()
    known = {**{k: getattr(base, k, None) for k in getattr(config_class, "attribute_map", {})}, **vars(base)}
    chosen: dict[str, Any] = {}
    for name, value in known.items():
        if name.startswith("drop_path") or any(name == word or name.endswith(f"_{word}") for word in RANDOM):
            if isinstance(value, list | tuple):
                chosen[name] = type(value)([0.0] * len(value))
            elif not isinstance(value, bool):
                chosen[name] = 0 if isinstance(value, int) else 0.0
        elif isinstance(value, list | tuple) and name in STAGES and value and isinstance(value[0], int):
            chosen[name] = type(value)([STAGES[name]] * len(value))
        elif name in SIZES and (value is None or isinstance(value, int)):
            chosen[name] = SIZES[name]
        elif hasattr(value, "to_diff_dict"):  # a configuration inside
            chosen[name] = small(type(value))
    chosen |= {"apply_spec_augment": False} if "apply_spec_augment" in known else {}
    chosen |= {"head_dim": chosen["qk_rope_head_dim"]} if {"head_dim", "qk_rope_head_dim"} <= chosen.keys() else {}
    if {"expand", "num_heads", "head_dim"} <= known.keys():  # as many entries in all heads as in what is expanded
        chosen["head_dim"] = 16
    return config_class(**{**chosen, **ALWAYS, **PARTICULAR.get(config_class.model_type, {})})


def batch(task: str, config: Any) -> dict[str, Tensor]:
    """Inputs and labels of three samples."""
    ids = torch.randint(3, V, (N, T))
    if task in ("causal", "masked"):
        return {"input_ids": ids, "labels": ids.clone()}
    if task == "sequences":
        return {"input_ids": ids, "labels": torch.randint(3, V, (N, T))}
    if task == "tokens":
        return {"input_ids": ids, "labels": torch.randint(CLASSES, (N, T))}
    if task == "questions":  # where the answer begins and ends
        return {"input_ids": ids, "start_positions": torch.randint(T, (N,)), "end_positions": torch.randint(T, (N,))}
    if task == "choices":
        return {"input_ids": torch.randint(3, V, (N, 2, T)), "labels": torch.randint(2, (N,))}
    if task == "frames":
        return {"input_values": torch.randn(N, 1600), "labels": torch.randint(2, (N, 4, CLASSES)).double()}
    if task == "speech":
        return {**_sound(config, 1600), "labels": torch.randint(3, V, (N, 2))}
    labels = torch.randint(CLASSES, (N,))
    if task == "texts":
        ids[:, -1] = 2  # where some models look
        return {"input_ids": ids, "labels": labels}
    if task == "audio":
        return {**_sound(config, 800), "labels": labels}
    vision = getattr(config, "vision_config", config)
    side = getattr(vision, "image_size", None) or 32
    sides = [side] * 2 if isinstance(side, int) else list(side)[-2:]
    return {"pixel_values": torch.randn(N, getattr(vision, "num_channels", 3), *sides), "labels": labels}


def _sound(config: Any, length: int) -> dict[str, Tensor]:
    """A sound as the model takes it: as it is, or as the strengths of frequencies in each of its pieces."""
    kind = config.model_type
    if kind == "whisper":
        return {"input_features": torch.randn(N, config.num_mel_bins, 2 * config.max_source_positions)}
    if kind == "audio-spectrogram-transformer":
        return {"input_values": torch.randn(N, config.max_length, config.num_mel_bins)}
    if kind == "wav2vec2-bert":
        return {"input_features": torch.randn(N, 24, config.feature_projection_input_dim)}
    return {"input_values": torch.randn(N, length)}


def build(task: str, model_class: Any, config_class: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small model with random weights, in training mode but for statistics of the batch, and a batch for it."""
    torch.manual_seed(0)
    config = small(config_class)
    config.num_labels = 2 if task == "questions" else CLASSES  # beginning and end
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > MOST:
        raise OverflowError(f"{size:,} parameters")
    model = model_class(config).double().train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model, batch(task, config)


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The loss that the model computes of its own accord."""
    torch.manual_seed(1)
    return model(**inputs).loss


def examine(task: str, model_class: Any, config_class: Any) -> Found:
    """Compare one architecture with the oracle."""
    found = Found(task, model_class.__name__, "right")
    try:
        model, inputs = build(task, model_class, config_class)
        loss_of(model, inputs).backward()
    except Late:
        raise
    except OverflowError as error:
        return Found(task, found.name, "large", str(error))
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
        precise = "Double" in words or "double" in words or "float64" in words
        return Found(task, found.name, "not float64" if precise else "not built", words[:200])
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    if not all(bool(g.isfinite().all()) for g in grads.values()):
        return Found(task, found.name, "not finite", "the plain gradient has NaN")
    rows = testing.individual_gradients(
        model, lambda output, _: output.loss, inputs, torch.zeros(N), weights=[1 / N] * N
    )
    top = max(float(g.abs().max()) for g in grads.values() if g.numel())
    off = max(float((rows[name].sum(0) - g).abs().max()) for name, g in grads.items() if name in rows and g.numel())
    coupled = off > 1e-4 * top
    px.extend(model)
    quantities = [px.BatchGrad(), px.BatchL2Grad(), px.Variance(), px.GradDot(), px.BatchDotGrad(), px.ClippedGrad(0.1)]
    try:
        model.zero_grad()
        with px.backpack(*quantities, scale="loss"):
            loss_of(model, inputs).backward()
    except Late:
        raise
    except px.PackextError as error:
        return Found(task, found.name, "coupled, refused" if coupled else "refused", str(error)[:300])
    except Exception as error:
        return Found(task, found.name, "crashed", f"{type(error).__name__}: {error}"[:300])
    if coupled:
        return Found(task, found.name, "coupled, not refused", f"rows miss the gradient by {off / top:.1e}")
    # Some compute parts in float32, whatever the precision of their parameters.
    report = testing.compare(model, quantities, rows, float(N), 1e-4)
    if not report.ok:
        return Found(task, found.name, "wrong", str(report)[:600])
    found.curvature = {
        name: given(model, inputs, make) for name, make in (("DiagGGNMC", px.DiagGGNMC), ("KFAC", px.KFAC))
    }
    return found


def given(model: nn.Module, inputs: dict[str, Tensor], make: Callable[[], Any]) -> str:
    """Whether a pass gives a quantity: "given", or the words of its refusal."""
    model.zero_grad()
    try:
        with px.backpack(make()):
            loss_of(model, inputs).backward()
    except px.PackextError as error:
        return f"refused: {str(error)[:200]}"
    except Late:
        raise
    except Exception as error:
        return f"crashed: {type(error).__name__}: {error}"[:300]
    return "given"


def architectures(tasks: list[str], only: list[str]) -> Iterator[tuple[str, Any, Any]]:
    """Task, class of the model, class of its configuration."""
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    transformers.logging.set_verbosity_error()
    for task in tasks:
        for key, names in getattr(modeling_auto, TASKS[task]).items():
            if only and key not in only:
                continue
            try:
                model_class = getattr(transformers, names if isinstance(names, str) else names[0])
                yield task, model_class, model_class.config_class or CONFIG_MAPPING[key]
            except Exception:  # needs a package that is not there
                continue


def run(tasks: list[str], only: list[str]) -> list[Found]:
    """Try them all."""

    def late(*_: Any) -> None:
        raise Late

    signal.signal(signal.SIGALRM, late)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    results = []
    for task, model_class, config_class in architectures(tasks, only):
        signal.alarm(SECONDS)
        try:
            found = examine(task, model_class, config_class)
        except Late:
            found = Found(task, model_class.__name__, "slow", f"more than {SECONDS} s")
        except Exception as error:
            found = Found(task, model_class.__name__, "not built", f"{type(error).__name__}: {error}"[:200])
        finally:
            signal.alarm(0)
        results.append(found)
        print(f"{task:<10} {found.name:<48} {found.outcome:<12} {found.detail[:100]!r}", file=sys.stderr, flush=True)
    return results


def table(results: list[dict[str, Any]]) -> str:
    """A line for each task: how many were tried, right, refused, and given curvature."""
    head = ["task", "tried", "right", "refused", "wrong", "`DiagGGNMC`", "`KFAC`", "not tried"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for task in [*TASKS, "all"]:
        here = [r for r in results if task in (r["task"], "all")]
        if not here:
            continue
        count = Counter(r["outcome"] for r in here)
        left = sum(count[k] for k in UNTRIED)
        curved = [r["curvature"] for r in here if r["curvature"]]
        numbers = [
            len(here) - left,
            count["right"],
            count["refused"] + count["coupled, refused"],
            count["wrong"] + count["crashed"] + count["coupled, not refused"],
            *(sum(c[k] == "given" for c in curved) for k in ("DiagGGNMC", "KFAC")),
            left,
        ]
        lines.append(f"| {task} | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(lines)


def sentence(results: list[dict[str, Any]]) -> str:
    """The same in two lines."""
    count = Counter(r["outcome"] for r in results)
    off = count["wrong"] + count["crashed"] + count["coupled, not refused"]
    tried = sum(count.values()) - sum(count[k] for k in UNTRIED)
    kfac = sum(r["curvature"]["KFAC"] == "given" for r in results if r["curvature"])
    return (
        f"Of {tried} models of Hugging Face's `transformers` (an architecture with the head of a task), tried with "
        f"random weights\nand their own loss, {count['right']} are right, {tried - count['right'] - off} refused, "
        f"{off or 'none'} wrong; "
        f"{kfac} have Kronecker factors for every parameter ([how](docs/models.md))."
    )


def pages(results: list[dict[str, Any]]) -> dict[Path, str]:
    """The pages with table and sentence renewed."""
    models, readme = ROOT / "docs" / "models.md", ROOT / "README.md"
    return {
        models: between(models.read_text(), "zoo", table(results)),
        readme: between(readme.read_text(), "zoo", sentence(results)),
    }


def main() -> None:
    """Run, and write results and page; a part takes the place of what was known of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help="some of them")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="model types, such as llama")
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(1)  # models are small: threads wait for each other
    found = [asdict(f) for f in run(arguments.tasks, arguments.only)]
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    new = {(f["task"], f["name"]) for f in found}
    results = sorted(
        [*found, *(r for r in known if (r["task"], r["name"]) not in new)],
        key=lambda r: (list(TASKS).index(r["task"]), r["name"].lower()),
    )
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for page, text in pages(results).items():
        page.write_text(text)


if __name__ == "__main__":
    main()
