"""Train a vision backbone on ImageNet-1k, or on any folder of images.

Two minutes on a CPU:   python train_imagenet.py --config quickstart
ImageNet, one GPU:      python train_imagenet.py --config imagenet1k/metala_tiny --data-dir DIR
                            --batch-size 256 --grad-accum-steps 4   (a batch of 1024)
Any folder of images:   python train_imagenet.py --data-dir DIR --model metala_tiny --epochs 90

DIR holds train/ and val/ with one folder per class. `--help` lists every key of a configuration;
each is a flag. The same as `metala-vision train`; the code is in metala_vision/train.py.
"""

import sys

if __name__ == "__main__":
    try:
        from metala_vision.cli import main
    except KeyboardInterrupt:  # the imports take seconds
        sys.exit(130)
    sys.exit(main(prog="train_imagenet.py", command="train"))
