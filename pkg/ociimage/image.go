// Package ociimage writes container images as archives in OCI image layout 1.0,
// which `ctr images import`, podman, skopeo and others read. It needs no registry,
// no daemon and no privileges. The same image gives the same bytes, whenever and
// wherever it is written.
package ociimage

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"
)

// Image is what an archive is made of.
type Image struct {
	// Ref is the name that the image gets where it is imported:
	// "registry.example/name:tag".
	Ref          string
	Created      time.Time // of everything in it
	Architecture string    // in Go's words: amd64, arm64
	Config       Config
	Labels       map[string]string // of the config, and as annotations of the manifest
	Layers       []*Tree           // from the lowest up
}

// Config is how a container of the image is started (OCI image specification,
// config.md).
type Config struct {
	Env        []string `json:"Env,omitempty"`
	Entrypoint []string `json:"Entrypoint,omitempty"`
	Cmd        []string `json:"Cmd,omitempty"`
	WorkingDir string   `json:"WorkingDir,omitempty"`
}

const (
	typeIndex    = "application/vnd.oci.image.index.v1+json"
	typeManifest = "application/vnd.oci.image.manifest.v1+json"
	typeConfig   = "application/vnd.oci.image.config.v1+json"
	typeLayer    = "application/vnd.oci.image.layer.v1.tar+gzip"
)

// Annotations of the manifest in the index, by which importers name the image: the
// first is containerd's own, see `ctr images import --help`.
const (
	containerdName = "io.containerd.image.name"
	refName        = "org.opencontainers.image.ref.name"
)

// Write writes the archive.
func (i Image) Write(to io.Writer) error {
	repository, tag, ok := cutTag(i.Ref)
	if !ok {
		return fmt.Errorf("write image: reference %q: must be NAME:TAG", i.Ref)
	}
	l := layout{created: i.Created.UTC().Truncate(time.Second), blobs: &Tree{}}
	var layers []descriptor
	var diffIDs []string
	var history []map[string]any
	for _, t := range i.Layers {
		packed, diffID, err := pack(t, l.created)
		if err != nil {
			return fmt.Errorf("write image %s: %w", repository, err)
		}
		layers, diffIDs = append(layers, l.blob(typeLayer, packed)), append(diffIDs, diffID)
		history = append(history, map[string]any{"created": l.created})
	}
	config := l.json(typeConfig, map[string]any{
		"created": l.created, "architecture": i.Architecture, "os": "linux",
		"config": struct {
			Config
			Labels map[string]string `json:"Labels,omitempty"`
		}{i.Config, i.Labels},
		"rootfs":  map[string]any{"type": "layers", "diff_ids": diffIDs},
		"history": history,
	})
	manifest := l.json(typeManifest, struct {
		SchemaVersion int               `json:"schemaVersion"`
		MediaType     string            `json:"mediaType"`
		Config        descriptor        `json:"config"`
		Layers        []descriptor      `json:"layers"`
		Annotations   map[string]string `json:"annotations,omitempty"`
	}{2, typeManifest, config, layers, i.Labels})
	manifest.Annotations = map[string]string{containerdName: i.Ref, refName: tag}
	manifest.Platform = map[string]string{"architecture": i.Architecture, "os": "linux"}
	index := l.marshal(map[string]any{"schemaVersion": 2, "mediaType": typeIndex, "manifests": []descriptor{manifest}})
	l.blobs.File("index.json", 0o644, index)
	l.blobs.File("oci-layout", 0o644, []byte(`{"imageLayoutVersion":"1.0.0"}`))
	if err := errors.Join(l.err, l.blobs.writeTar(to, l.created)); err != nil {
		return fmt.Errorf("write image %s: %w", i.Ref, err)
	}
	return nil
}

// cutTag splits at the last colon that is not a port's.
func cutTag(ref string) (name, tag string, ok bool) {
	n := strings.LastIndexByte(ref, ':')
	if n <= 0 || n == len(ref)-1 || strings.ContainsRune(ref[n:], '/') {
		return "", "", false
	}
	return ref[:n], ref[n+1:], true
}

// pack makes the blob of a layer, and the digest of what is in it.
func pack(t *Tree, moment time.Time) (packed []byte, diffID string, err error) {
	var out bytes.Buffer
	sum := sha256.New()
	z, err := gzip.NewWriterLevel(&out, gzip.DefaultCompression) // its header says no time and no system
	if err == nil {
		err = t.writeTar(io.MultiWriter(z, sum), moment)
	}
	if err == nil {
		err = z.Close()
	}
	return out.Bytes(), digest(sum.Sum(nil)), err
}

func digest(sum []byte) string { return fmt.Sprintf("sha256:%x", sum) }

// descriptor points to a blob (OCI image specification, descriptor.md).
type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Platform    map[string]string `json:"platform,omitempty"`
}

// layout is an archive in the making. The first error stays.
type layout struct {
	created time.Time
	blobs   *Tree
	err     error
}

func (l *layout) blob(mediaType string, content []byte) descriptor {
	sum := sha256.Sum256(content)
	l.blobs.File(path.Join("blobs/sha256", fmt.Sprintf("%x", sum)), 0o644, content)
	return descriptor{MediaType: mediaType, Digest: digest(sum[:]), Size: len(content)}
}

func (l *layout) json(mediaType string, v any) descriptor { return l.blob(mediaType, l.marshal(v)) }

func (l *layout) marshal(v any) []byte {
	b, err := json.Marshal(v)
	l.err = errors.Join(l.err, err)
	return b
}
