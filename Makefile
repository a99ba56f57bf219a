# The commands of this project; `make` alone lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.PHONY: help start restart stop status lab ui secrets converge verify plan deploy register-blocks \
        create-blocks run certificates env server venv test lint unit molecule e2e benchmarks docs lock

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
DEPLOY_OPTIONS = $(if $(PRUNE),-e prefect_deploy_prune=true)
CREATE_BLOCKS_OPTIONS = $(if $(ONLY),-e prefect_deploy_blocks_only=$(ONLY)) $(if $(DRY_RUN),-e prefect_deploy_blocks_dry_run=true) \
                        $(if $(PRUNE),-e prefect_deploy_blocks_prune=true)
PORT ?= 4200

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

start: venv lab ## Everything: local hosts, converge, deploy, one run of each deployment, the UI's address
	@python scripts/make_secrets.py $(INVENTORY)
	@python -m lab.artifacts $(if $(filter lan,$(LAB_FLEET)),rustfs,tailscale headscale rustfs) >/dev/null
	@$(PLAYBOOK) site.yml
	@$(MAKE) --no-print-directory run
	@echo "This machine is not in that tailnet: 'make ui' brings the UI to http://127.0.0.1:4200"

restart: stop start ## Remove the local hosts and start again from nothing

stop: venv ## Remove the local hosts and everything of theirs but the download cache
	@python -m lab down

status: venv ## One line a local host
	@python -m lab status

lab: venv ## Boot the local hosts and write their inventory
	@python -m lab up

ui: venv ## Forward the local fleet's UI to http://127.0.0.1:4200 until Ctrl-C
	@python -m lab ui

secrets: venv ## Generate the secrets that INVENTORY lacks
	@python scripts/make_secrets.py $(INVENTORY)

converge: venv ## Bring every host of INVENTORY to the state that it describes
	@$(PLAYBOOK) site.yml

verify: venv ## A canary flow run on each worker host, and what must not be reachable
	@$(PLAYBOOK) playbooks/verify.yml

plan: venv ## Say what `make deploy` would change; PRUNE=1 as there
	@$(PLAYBOOK) playbooks/deploy.yml -e deploy_only_plan=true $(DEPLOY_OPTIONS)

deploy: venv ## Say what changes, then release the code, its blocks and deployments; PRUNE=1 removes what is gone
	@$(PLAYBOOK) playbooks/deploy.yml $(DEPLOY_OPTIONS)

register-blocks: venv ## Register the block types (a part of deploy)
	@$(PLAYBOOK) playbooks/register_blocks.yml

create-blocks: venv ## Store the DHIS2 servers of INVENTORY (a part of deploy); ONLY=name, DRY_RUN=1, PRUNE=1
	@$(PLAYBOOK) playbooks/create_blocks.yml $(CREATE_BLOCKS_OPTIONS)

rotate: venv ## Replace every secret of INVENTORY while its fleet runs
	@$(PLAYBOOK) playbooks/rotate.yml

run: venv ## Run each deployment once and watch it, then print where the UI is
	@$(PLAYBOOK) playbooks/run.yml

certificates: venv ## Issue the certificates that are missing or end soon; RENEW=1 all of them now
	@$(PLAYBOOK) playbooks/certificates.yml $(if $(RENEW),-e certificates_renew_now=true)

env: venv ## Write .env, with which prefect and flows on this machine talk to the fleet
	@$(PLAYBOOK) playbooks/env.yml

server: venv ## A Prefect server on this machine alone; PREFECT_SERVER_API_AUTH_STRING puts a password on it
	@PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1 prefect server start --host 127.0.0.1 --port $(PORT)

venv: ## Make .venv as requirements/control.txt locks it
	@scripts/bootstrap

test: venv ## Lint, unit tests, the whole site and each role on local hosts, the UI; ROLE=name: one role
	@scripts/test $(ROLE)

lint: venv ## ruff, yamllint, shellcheck, ansible-lint
	@scripts/test lint

unit: venv ## Unit tests
	@scripts/test unit

molecule: venv ## All of Molecule's scenarios: the whole site and each role, on local hosts
	@scripts/test molecule

e2e: venv ## Log in to the UI with a browser, over the tailnet
	@scripts/test e2e

benchmarks: venv ## Measure against Prefect's own worker and converges' floor, within 15 minutes: docs/performance.md
	@benchmarks/all

docs: venv ## Write the tables of inputs into the roles' READMEs
	@python scripts/role_readmes.py

LOCK = uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
       --no-emit-index-url --override requirements/overrides.in
lock: venv ## Resolve requirements/*.in anew
	@$(LOCK) requirements/prefect.in -o requirements/prefect.txt
	@$(LOCK) -c requirements/prefect.txt requirements/control.in -o requirements/control.txt
	@$(LOCK) -c requirements/control.txt requirements/uv.in -o requirements/uv.txt
