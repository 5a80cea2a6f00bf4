# Twill. `make` alone lists what there is to do.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
LDFLAGS := -s -w -X main.version=$(VERSION)
BIN     := build/bin
PROGRAMS := $(BIN)/twilld $(BIN)/netctl $(BIN)/twill $(BIN)/lab $(BIN)/nothing $(BIN)/flannelstandin
GO_FILES := $(shell find daemon e2e pkg plugins -name '*.go') $(shell find manifests -type f) go.mod go.sum
FUZZTIME ?= 10s

.PHONY: help
help: ## list these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

.PHONY: deps
deps: ## install the Debian packages that demo and benchmarks need
	@e2e/deps.sh

.PHONY: test-deps
test-deps: ## install what the tests need, too: BIRD, FRR, containerd, QEMU with a kernel, etcd 3.4
	@e2e/deps.sh test

.PHONY: build
build: $(PROGRAMS) ## build twilld, netctl, twill and the lab into build/bin

$(BIN)/twilld: $(GO_FILES)
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $@ ./daemon/cmd/twilld
$(BIN)/netctl: $(GO_FILES)
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $@ ./daemon/cmd/netctl
$(BIN)/twill: $(GO_FILES)
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.release=$(VERSION)' -o $@ ./plugins/twill
$(BIN)/lab: $(GO_FILES)
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $@ ./e2e/lab
$(BIN)/nothing: $(GO_FILES)
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $@ ./e2e/nothing

$(BIN)/flannelstandin: $(GO_FILES)
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o $@ ./e2e/kubernetes/flannelstandin

# For another architecture: make image GOARCH=arm64. Two builds of one commit with the
# same packages of Debian's give the same bytes; make clean makes it fetch them anew.
IMAGE_ARCH = $(or $(GOARCH),$(shell go env GOARCH))
SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)
IMAGE ?= build/image/twill.tar

.PHONY: image
image: ## build the container image, build/image/twill.tar
	CGO_ENABLED=0 GOOS=linux GOARCH=$(IMAGE_ARCH) go build -trimpath -buildvcs=false -ldflags '$(LDFLAGS) -X main.release=$(VERSION)' \
		-o build/image/programs-$(IMAGE_ARCH)/ ./daemon/cmd/twilld ./daemon/cmd/netctl ./plugins/twill
	GOARCH= go run ./manifests/image --arch $(IMAGE_ARCH) --programs build/image/programs-$(IMAGE_ARCH) --work build/image \
		--version '$(VERSION)' --revision "$$(git rev-parse HEAD 2>/dev/null || true)" --created $(SOURCE_DATE_EPOCH) --output $(IMAGE)

.PHONY: demo
demo: deps build ## three hosts, an etcd, pods: see packets cross, and the backend change (KEEP=1 leaves it up)
	@TWILL_BIN_DIR=$(BIN) $(BIN)/lab demo $(if $(KEEP),--keep)

.PHONY: test
test: test-deps lint build ## lint and all tests, with the race detector where goroutines are, on real kernels and etcd
	@e2e/test.sh

.PHONY: kubernetes
kubernetes: test-deps ## build real Kubernetes for the tests, once; kept in TWILL_KUBERNETES (/var/tmp/twill-kubernetes)
	@e2e/kubernetes/build.sh

.PHONY: e2e-kubernetes
e2e-kubernetes: test-deps build image ## Twill from its image on real Kubernetes: control plane, three nodes, kubelets
	@e2e/kubernetes.sh

.PHONY: bench
bench: deps build ## measure: 10,000 peers, one more peer, CNI, beside a reference in the same run
	@TWILL_BIN_DIR=$(BIN) $(BIN)/lab bench

.PHONY: fuzz
fuzz: ## run every fuzzer for FUZZTIME (10s) each
	@e2e/fuzz.sh $(FUZZTIME)

.PHONY: lint
lint: ## gofumpt, vet, staticcheck, import layers
	@out=$$(go tool gofumpt -l daemon e2e manifests pkg plugins); [ -z "$$out" ] || { echo "not gofumpt'ed: $$out"; exit 1; }
	go vet ./...
	go tool staticcheck ./...
	go test -count=1 -run TestImportLayers ./e2e/layers

.PHONY: manifests
manifests: ## render manifests/twill.yaml from the Helm chart
	go run ./daemon/cmd/netctl install --print >build/twill.yaml
	mv build/twill.yaml manifests/twill.yaml

.PHONY: install
install: build ## install the programs below DESTDIR
	install -D -m 755 $(BIN)/twilld $(DESTDIR)/usr/local/sbin/twilld
	install -D -m 755 $(BIN)/netctl $(DESTDIR)/usr/local/bin/netctl
	install -D -m 755 $(BIN)/twill $(DESTDIR)/opt/cni/bin/twill

.PHONY: clean
clean: ## remove what was built, and labs that were left
	@if [ -x $(BIN)/lab ]; then $(BIN)/lab down; fi
	rm -rf build
