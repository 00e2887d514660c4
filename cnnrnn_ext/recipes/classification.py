"""Recipes that choose classes: one head or several, each a linear layer's logits."""

import torch
from torch.nn import functional as F

from cnnrnn_ext.recipes.base import Recipe, outputs_of


class Classification(Recipe):
    """A recipe whose model returns logits [N, classes], or {head: logits} for several heads.

    ``facts["classes"]`` is {head: [class names]}, with the one head "label" where the model returns plain
    logits; ``batch.targets`` is {head: class numbers [N], int64}.

    Metrics: ``accuracy`` (all heads right at once), for several heads ``accuracy_<head>`` too, and
    ``confusion_<head>``, rows for the true classes.
    """

    def logits(self, outputs):
        """{head: logits} of what the model returned."""
        return outputs if isinstance(outputs, dict) else {"label": outputs}

    def loss(self, outputs, batch):
        logits = self.logits(outputs)
        total = sum(F.cross_entropy(logits[head], target, reduction="sum")
                    for head, target in batch.targets.items())  # fmt: skip
        return total, len(next(iter(batch.targets.values())))

    def metrics(self, facts):
        from torchmetrics import MeanMetric
        from torchmetrics.classification import MulticlassConfusionMatrix

        classes = facts["classes"]
        heads = [f"accuracy_{head}" for head in classes] if len(classes) > 1 else []
        return {
            **{name: MeanMetric() for name in ("accuracy", *heads)},
            **{f"confusion_{head}": MulticlassConfusionMatrix(len(names)) for head, names in classes.items()},
        }

    def update(self, metrics, model, outputs, batch):
        right = []
        for head, logits in self.logits(outputs).items():
            chosen, target = logits.argmax(1), batch.targets[head]
            metrics[f"confusion_{head}"].update(chosen, target)
            right.append(chosen == target)
            if f"accuracy_{head}" in metrics:
                metrics[f"accuracy_{head}"].update(right[-1].float())
        metrics["accuracy"].update(torch.stack(right).all(0).float())

    def predict(self, model, batch, facts):
        """[{head: {"class", "probability", "probabilities": {class: p}}}], the likeliest classes first."""
        found = []
        for head, logits in self.logits(self.forward(model, batch)).items():
            names = facts["classes"][head]
            for row, values in enumerate(logits.softmax(1).tolist()):
                ranked = sorted(zip(names, values, strict=True), key=lambda pair: -pair[1])
                if row == len(found):
                    found.append({})
                found[row][head] = {
                    "class": ranked[0][0],
                    "probability": ranked[0][1],
                    "probabilities": dict(ranked),
                }
        return found

    def describe(self, prediction):
        """The class of each head with its probability, and the runner-up of a doubtful one."""
        parts = []
        for head, found in prediction.items():
            told = f"{found['class']} {found['probability']:.1%}"
            others = list(found["probabilities"].items())[1:2]
            if others and others[0][1] > 0.05:
                told += f" (or {others[0][0]} {others[0][1]:.1%})"
            parts.append(told if head == "label" else f"{head} {told}")
        return ", ".join(parts)

    def pictures(self, folder, model, data, results):
        """confusion_<head>.png for each head."""
        from cnnrnn_ext.recipes import drawing

        paths = []
        for head, names in data.facts["classes"].items():
            paths.append(folder / ("confusion.png" if head == "label" else f"confusion_{head}.png"))
            drawing.confusion(paths[-1], results[f"confusion_{head}"], names, head)
        return paths

    def answers(self, model, split):
        """({head: [N]}, {head: [N]}): the classes that the model chooses for the rows, and the true ones."""
        chosen, truth = {}, {}
        for outputs, batch in outputs_of(self, model, split):
            for head, logits in self.logits(outputs).items():
                chosen.setdefault(head, []).append(logits.argmax(1).cpu())
                truth.setdefault(head, []).append(batch.targets[head].cpu())
        return tuple({head: torch.cat(parts) for head, parts in found.items()} for found in (chosen, truth))
