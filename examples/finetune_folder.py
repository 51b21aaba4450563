"""Fine-tuning a retrofitted model on an image folder: `python examples/finetune_folder.py [FOLDER]`.

FOLDER holds `CLASS/*.jpg`. Without it, 200 generated images are written to a temporary folder. The base keeps its
weights (load yours, or pass `--pretrained` to download them); the pools have ten times its learning rate.
"""
import argparse
import tempfile
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import create_transform, resolve_data_config
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import cpool_vision
from cpool_vision.data import ShapesDataset
from cpool_vision.retrofit import context_pools, param_groups


def write_images(folder: Path, count: int = 200) -> None:
    """Writes images of five classes that the package makes."""
    dataset = ShapesDataset('train', 2 * count, image_size=64)
    for i in range(2 * count):
        image, target = dataset[i]
        if target < 5:
            path = folder / dataset.classes[target] / f'{i}.jpg'
            path.parent.mkdir(exist_ok=True)
            image.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', nargs='?', type=Path)
    parser.add_argument('--model', default='resnet18')
    parser.add_argument('--pretrained', action='store_true')
    parser.add_argument('--size', type=int, default=64)
    parser.add_argument('--epochs', type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder
        if folder is None:
            folder = Path(temporary)
            write_images(folder)
        classes = len([p for p in folder.iterdir() if p.is_dir()])
        model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=classes)
        cpool_vision.add_context_pool(model, img_size=args.size)
        print(f'{args.model}: pools at {", ".join(context_pools(model))}')
        config = dict(resolve_data_config({}, model=model), input_size=(3, args.size, args.size))
        transform = create_transform(**config, is_training=True, scale=(.6, 1.))
        loader = DataLoader(ImageFolder(folder, transform), 20, shuffle=True)
        optimizer = torch.optim.AdamW(param_groups(model, pool_lr_scale=10, lr=5e-4, weight_decay=.05))
        for epoch in range(args.epochs):
            total, right = 0., 0
            for images, targets in loader:
                logits = model(images)
                loss = F.cross_entropy(logits, targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(targets)
                right += int((logits.argmax(1) == targets).sum())
            count = len(loader.dataset)
            print(f'epoch {epoch}: loss {total / count:.3f}, {100 * right / count:.1f} % of the training images')


if __name__ == '__main__':
    main()
