# The commands of this project; `make` alone lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.PHONY: help start restart stop status env lab secrets converge deploy verify run ui test lint unit \
        molecule e2e lock

# Which fleet of lab/fleets.toml `make start` and its like are about, and which inventory Ansible is
# given: your own by  make converge INVENTORY=inventory/mine
LAB_FLEET ?= lab
INVENTORY ?= inventory/$(LAB_FLEET)
export LAB_FLEET

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHONPATH := $(CURDIR)/src
export PYTHONUNBUFFERED := 1

# A mirror of the binaries that no package registry has, if one lies beside the project.
FLEET_ARTIFACT_MIRROR ?= $(realpath ../shared/artifacts)
export FLEET_ARTIFACT_MIRROR

PLAYBOOK := ansible-playbook -i $(INVENTORY)

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

start: env lab ## Everything: local hosts, converge, deploy, one run of each deployment, the UI's address
	@python scripts/make_secrets.py $(INVENTORY)
	@python -m lab.artifacts $(if $(filter lan,$(LAB_FLEET)),rustfs,tailscale headscale rustfs) >/dev/null
	@$(PLAYBOOK) site.yml
	@$(MAKE) --no-print-directory run
	@echo "This machine is not in that tailnet: 'make ui' brings the UI to http://127.0.0.1:4200"

restart: stop start ## Remove the local hosts and start again from nothing

stop: env ## Remove the local hosts and everything of theirs but the download cache
	@python -m lab down

status: env ## One line a local host
	@python -m lab status

env: ## Make .venv as requirements/control.txt locks it
	@scripts/bootstrap

lab: env ## Boot the local hosts and write their inventory
	@python -m lab up

secrets: env ## Generate the secrets that INVENTORY lacks
	@python scripts/make_secrets.py $(INVENTORY)

converge: env ## Bring every host of INVENTORY to the state that it describes
	@$(PLAYBOOK) site.yml

deploy: env ## Release the code and deploy every prefect.yaml: blocks, work pools, deployments
	@$(PLAYBOOK) playbooks/deploy.yml

verify: env ## A canary flow run on each worker host, and what must not be reachable
	@$(PLAYBOOK) playbooks/verify.yml

run: env ## Run each deployment once and watch it, then print where the UI is
	@$(PLAYBOOK) playbooks/run.yml

ui: env ## Forward the local fleet's UI to http://127.0.0.1:4200 until Ctrl-C
	@python -m lab ui

test: env ## Lint, unit tests, the whole site on local hosts, the UI in a browser
	@scripts/test

lint: env ## ruff, yamllint, ansible-lint, shellcheck
	@scripts/test lint

unit: env ## Unit tests
	@scripts/test unit

molecule: env ## The default scenario: the whole site on local hosts
	@scripts/test molecule

e2e: env ## Log in to the UI with a browser, over the tailnet
	@scripts/test e2e

LOCK = uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
       --no-emit-index-url --override requirements/overrides.in
lock: env ## Resolve requirements/*.in anew
	@$(LOCK) requirements/prefect.in -o requirements/prefect.txt
	@$(LOCK) -c requirements/prefect.txt requirements/control.in -o requirements/control.txt
	@$(LOCK) -c requirements/control.txt requirements/uv.in -o requirements/uv.txt
