"""`rein backbones`: how rein adapts the models of timm."""

import subprocess
import sys

import pytest

from rein import catalogue
from rein.cli import main


def test_a_model_is_described_without_its_weights():
    entry = catalogue.describe("vit_large_patch14_reg4_dinov2")
    assert entry.widths == (1024,) * 24
    assert entry.num_prefix_tokens == (5,) * 24
    assert entry.adapter_parameters == 2_990_081
    assert entry.parameters == 304_370_688
    assert f"{entry.fraction:.4f}" == "0.0097"
    assert "24x1024" in str(entry)


def test_stages_are_listed_and_refusals_have_a_reason():
    assert "1x24+2x32+4x48+2x64" in str(catalogue.describe("test_convnext"))
    refused = catalogue.describe("vgg11")
    assert refused.widths == ()
    assert "not supported: rein does not know the blocks of VGG. Pass them with blocks=[...]" in str(refused)


def test_the_command_prints_a_line_for_each_model_and_the_counts(capsys):
    assert main(["backbones", "*dinov2*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert lines[-1] == "8 of 8 supported, 0 not"
    assert main(["backbones", "vit_small_patch14_dinov2.lvd142m"]) == 0
    assert "684,033" in capsys.readouterr().out


def test_the_pocket_backbone_is_listed_by_its_name(capsys):
    assert main(["backbones", "pocket_vit"]) == 0
    assert "8 blocks 8x144" in capsys.readouterr().out


def test_an_unknown_pattern_prints_one_line(capsys):
    assert main(["backbones", "nosuch*"]) == 2
    assert (
        capsys.readouterr().err
        == "rein: timm has no model 'nosuch*'; expected a name or a shell-style pattern, such as '*dinov2*'.\n"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
def test_a_closed_pipe_is_no_error():
    program = "import sys; from rein.cli import main; sys.exit(main(['backbones', 'vit_tiny*']))"
    done = subprocess.run(f'{sys.executable} -c "{program}" | head -1', shell=True, capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr
