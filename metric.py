"""Logits and labels → Accuracy, AUC and macro F1; their mean and deviation over repetitions."""

from statistics import fmean, pstdev

from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from torch import Tensor


def metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Scores, 0 to 1, of predicting 1 where a logit (N,) is above 0; AUC of one label is nan."""
    truth, scores = labels.cpu().numpy(), logits.cpu().numpy()
    return {
        "Accuracy": float(accuracy_score(truth, scores > 0)),
        "AUC": float(roc_auc_score(truth, scores)) if truth.min() < truth.max() else float("nan"),
        "F1_macro": float(f1_score(truth, scores > 0, average="macro")),
    }


def summarize(results: list[dict[str, float]]) -> dict[str, float]:
    """Mean and population standard deviation of each metric over repetitions."""
    summary = {}
    for name in results[0]:
        values = [result[name] for result in results]
        summary |= {f"{name}_testmean": fmean(values), f"{name}_teststd": pstdev(values)}
    return summary
