"""What the API pages show of docstrings and options, read from the built pages' source: griffe with the extension."""

import pytest

from tests.support.paths import DOCS, ROOT


griffe = pytest.importorskip("griffe")


@pytest.fixture(scope="module")
def package():
    extensions = griffe.load_extensions(str(DOCS / "api_extension.py"))
    return griffe.load("video_trl", search_paths=[str(ROOT)], extensions=extensions, docstring_parser="google")


def test_help_texts_of_options_become_their_docstrings(package):
    beta = package["trainer.reg_dpo_config.VideoRegDPOConfig.beta"]
    assert "pull" in beta.docstring.value.lower() and str(beta.value) == "500.0"
    default = package["trainer.base_config.VideoConfig.cache_dir"]
    assert "encoded data" in default.docstring.value and str(default.value) == "None"


def test_types_lose_their_markup_and_cross_references_their_brackets(package):
    (arguments,) = [
        section
        for section in package["evaluation.probes.compare.probe_models"].docstring.parsed
        if section.kind is griffe.DocstringSectionKind.parameters
    ]
    told = {parameter.name: str(parameter.annotation) for parameter in arguments.value}
    assert told["model"] == "str" and told["block"] == "int" and told["physion"] == "str"
    assert "[`" not in package["trainer.dpo_trainer.VideoDPOTrainer"].docstring.value
    assert "`CollapseMonitor`" in package["trainer.dpo_trainer.VideoDPOTrainer"].docstring.value
