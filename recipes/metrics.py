"""Metrics of language models, as `evaluate` metrics that need no hub."""

import math

import datasets
import evaluate
import numpy as np
import torch
from transformers import EvalPrediction


class _TokenMetric(evaluate.Metric):
    """A number per token and the token itself; -100 as a reference leaves a token out."""

    dtype: str
    meaning: str

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value(self.dtype), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description=f"predictions: {self.meaning}; references: token ids.",
            features=datasets.Features(features),
        )


class Perplexity(_TokenMetric):
    """exp of the mean negative log-likelihood over the tokens whose reference is not -100."""

    dtype, meaning = "float32", "-log p of each reference token, in nats"

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        counted = np.asarray(references) != -100
        return {"perplexity": float(np.exp(np.asarray(predictions, np.float64)[counted].mean()))}


class TokenAccuracy(_TokenMetric):
    """Fraction of the tokens whose reference is not -100 that are predicted right."""

    dtype, meaning = "int64", "the likeliest token ids"

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        references = np.asarray(references)
        counted = references != -100
        return {"accuracy": float((np.asarray(predictions)[counted] == references[counted]).mean())}


class LanguageModelMetrics:
    """For a Trainer: `reduce` is its preprocess_logits_for_metrics, the object itself its compute_metrics."""

    def __init__(self, shift: bool, bytes_per_token: float | None = None) -> None:
        # A causal model's output at position i predicts token i + 1.
        self.shift = shift
        self.bytes_per_token = bytes_per_token
        self.perplexity, self.accuracy = Perplexity(keep_in_memory=True), TokenAccuracy(keep_in_memory=True)

    def reduce(self, logits: torch.Tensor | tuple, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep two numbers a token instead of the whole vocabulary's logits."""
        logits = logits[0] if isinstance(logits, tuple) else logits
        logits, labels = (logits[:, :-1], labels[:, 1:]) if self.shift else (logits, labels)
        losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
        return losses, logits.argmax(-1)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        losses, likeliest = prediction.predictions
        labels = (prediction.label_ids[:, 1:] if self.shift else prediction.label_ids).ravel()
        metrics = {
            **self.perplexity.compute(predictions=losses.ravel(), references=labels),
            **self.accuracy.compute(predictions=likeliest.ravel(), references=labels),
        }
        if self.bytes_per_token is not None:
            metrics["bits_per_byte"] = math.log2(metrics["perplexity"]) / self.bytes_per_token
        return metrics
