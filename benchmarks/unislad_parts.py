"""What each part of a trained Unislad's score is worth: image AUROC of every part, and w_p, by group of test images.

    python benchmarks/unislad_parts.py path/to/model.ckpt tray --root path/to/SyntheticLoco

The checkpoint is one that compare_patchcore.py has left in its results, or any other of a model with all parts.
"""

import argparse
from pathlib import Path

import torch
from torchmetrics.functional.classification import binary_auroc

from anomalib_pack.data import SyntheticLoco
from anomalib_unislad import Unislad
from anomalib_unislad.anomaly_map import fuse
from anomalib_unislad.torch_model import SCORES, UnisladModel

NORMAL = ""


def main() -> None:
    """Print a line for each group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("category")
    parser.add_argument("--root", type=Path, default=Path("datasets/SyntheticLoco"))
    arguments = parser.parse_args()

    module = Unislad.load_from_checkpoint(arguments.checkpoint, weights_only=True).eval()
    datamodule = SyntheticLoco(root=arguments.root, category=arguments.category, num_workers=0, eval_batch_size=4)
    datamodule.prepare_data()
    datamodule.setup()
    rows, groups, similarities = [], [], []
    with torch.no_grad():
        for batch in datamodule.test_dataloader():
            scores, similarity = parts(module.model, module.pre_processor.transform(batch.image))
            rows.append(scores)
            similarities.append(similarity)
            groups += batch.group
    table, w_p = torch.cat(rows), torch.cat(similarities)
    print(f"w_p from {w_p.min():.3f} to {w_p.max():.3f}\n\n| group | {' | '.join(SCORES)} | S_i | S |\n|{'---|' * 7}")
    for group in sorted({*groups} - {NORMAL}):
        chosen = torch.tensor([index for index, name in enumerate(groups) if name in (NORMAL, group)])
        labels = torch.tensor([groups[index] == group for index in chosen])
        # Ranks, because binary_auroc squashes scores outside [0, 1].
        values = [binary_auroc(column.argsort().argsort() / len(column), labels.int()) for column in table[chosen].T]
        print(f"| {group} | {' | '.join(f'{100 * value:.1f}' for value in values)} |")


def parts(model: UnisladModel, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of images: the four standardised ones, S_i of Eq. 20 and S of Eq. 21 (B, 6); and w_p of Eq. 17 (B,)."""
    features = model.extract(images)
    raw = torch.stack(model.raw_scores(features, model.patch_map(features)), dim=1)
    local, global_, class_token, patch = ((raw - model.score_mean) / model.score_std).unbind(dim=1)
    of_image = fuse(local, fuse(global_, class_token, model.w_ig), model.w_i)
    columns = [local, global_, class_token, patch, of_image, fuse(of_image, patch, model.w)]
    return torch.stack(columns, dim=1), model.local_share(features.class_token)


if __name__ == "__main__":
    main()
