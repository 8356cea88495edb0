"""Pipelines as files: JSON or YAML that names policies and their fields, and runs no code."""

from .read import load_pipeline as load_pipeline
from .read import pipeline_from as pipeline_from
from .text import is_file_name as is_file_name
from .write import data_of as data_of
from .write import save_pipeline as save_pipeline
