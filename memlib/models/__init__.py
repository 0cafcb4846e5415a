"""Networks by name: the paper's three and any of timm's."""

from memlib.models.build import build_model as build_model
from memlib.models.build import check_image_size as check_image_size
from memlib.models.build import check_model_name as check_model_name
from memlib.models.resnet9 import ResNet9 as ResNet9
from memlib.models.vit import ViT as ViT
