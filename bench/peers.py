"""Inference contestants outside PyTorch: ONNX Runtime, OpenVINO, CTranslate2; fp32, each at its best setting."""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .models import build_model, real_tokens
from .workloads import Workload


class _Hidden(torch.nn.Module):
    """BertModel as a function of ids (and mask) to the last hidden state: what the exporters trace."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def _hidden(workload: Workload, attention: str) -> _Hidden:
    return _Hidden(build_model("BertModel", workload, attention).eval())


class OnnxRuntime:
    """torch.onnx.export, then ONNX Runtime's own transformer optimizer (fused attention, GELU, LayerNorm), then all of
    its session optimizations."""

    def __init__(self, name: str, workload: Workload) -> None:
        import onnxruntime

        ids = workload.inputs["input_ids"]
        self.mask = workload.inputs.get("attention_mask")
        model = _hidden(workload, "eager")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        # its optimizer finds the attention only in what the TorchScript exporter writes of eager attention with a mask;
        # so fused it needed 13 to 21 % less time on ragged batches than without, and the same on one short sequence
        mask = torch.ones_like(ids) if self.mask is None else self.mask
        names = ["input_ids", "attention_mask"]
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = Path(scratch) / "model.onnx"
            torch.onnx.export(
                model, (ids, mask), path, input_names=names, output_names=["hidden"], dynamo=False, opset_version=17
            )
            self.fused = _fuse(path, model.model.config)
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        self.version = onnxruntime.__version__

    def run(self) -> np.ndarray:
        return self.session.run(None, self.feed)[0]

    def outputs(self) -> dict[str, torch.Tensor]:
        return {"last_hidden_state": real_tokens(torch.from_numpy(self.run()), self.mask)}

    def details(self) -> dict[str, Any]:
        return {"version": self.version, "fused": self.fused}


def _fuse(path: Path, config: Any) -> dict[str, int]:
    """Rewrites the model at ``path`` with fused operators; returns how many of each."""
    from onnxruntime.transformers import optimizer

    heads, hidden = config.num_attention_heads, config.hidden_size
    fused = optimizer.optimize_model(str(path), "bert", num_heads=heads, hidden_size=hidden, opt_level=0)
    fused.save_model_to_file(str(path), use_external_data_format=True)
    return {kind: count for kind, count in fused.get_fused_operator_statistics().items() if count}


class OpenVino:
    """OpenVINO's conversion of the PyTorch model with static shapes, latency hint, fp32 arithmetic."""

    def __init__(self, name: str, workload: Workload) -> None:
        import openvino

        arguments = tuple(workload.inputs[n] for n in ("input_ids", "attention_mask") if n in workload.inputs)
        model = _hidden(workload, "sdpa")
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted = openvino.convert_model(
                model, example_input=arguments, input=[tuple(a.shape) for a in arguments]
            )
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.request = openvino.Core().compile_model(converted, "CPU", settings).create_infer_request()
        self.feed = [a.numpy() for a in arguments]
        self.mask = workload.inputs.get("attention_mask")
        self.version = openvino.__version__

    def run(self) -> np.ndarray:
        return self.request.infer(self.feed, share_inputs=True, share_outputs=True)[0]

    def outputs(self) -> dict[str, torch.Tensor]:
        return {"last_hidden_state": real_tokens(torch.from_numpy(np.array(self.run())), self.mask)}

    def details(self) -> dict[str, Any]:
        return {"version": self.version}


class CTranslate2:
    """CTranslate2's converter and Encoder; it takes ids and lengths and drops the padding by itself."""

    def __init__(self, name: str, workload: Workload) -> None:
        import ctranslate2

        with tempfile.TemporaryDirectory() as scratch:
            source = workload.model.get("path") or _saved(workload, Path(scratch) / "source")
            target = str(Path(scratch) / "converted")
            ctranslate2.converters.TransformersConverter(str(source)).convert(target)
            self.encoder = ctranslate2.Encoder(
                target, device="cpu", compute_type="float32", intra_threads=torch.get_num_threads(), inter_threads=1
            )
        ids = workload.inputs["input_ids"]
        self.mask = workload.inputs.get("attention_mask")
        lengths = torch.full((len(ids),), ids.shape[1]) if self.mask is None else self.mask.sum(1)
        view = ctranslate2.StorageView.from_array
        self.ids = view(ids.to(torch.int32).numpy())
        self.lengths = view(lengths.to(torch.int32).numpy())
        self.version = ctranslate2.__version__

    def run(self) -> Any:
        return self.encoder.forward_batch(self.ids, self.lengths).last_hidden_state

    def outputs(self) -> dict[str, torch.Tensor]:
        return {"last_hidden_state": real_tokens(torch.from_numpy(np.array(self.run())), self.mask)}

    def details(self) -> dict[str, Any]:
        return {"version": self.version}


def _saved(workload: Workload, folder: Path) -> Path:
    """The random model of ``workload`` as a checkpoint; its vocabulary is made up, as the converter reads one."""
    from transformers import BertTokenizerFast

    model = build_model("BertModel", workload, "sdpa")
    model.config.position_embedding_type = "absolute"  # which the converter asks for and transformers 5 no longer has
    model.save_pretrained(folder)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary += [f"w{i}" for i in range(len(vocabulary), model.config.vocab_size)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder
