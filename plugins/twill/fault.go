package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
)

// printError prints the error object (CNI specification, section 5). The library's
// has no version, which every version of the specification asks for.
func printError(e *types.Error, stdin []byte) {
	var conf basics
	_ = json.Unmarshal(stdin, &conf) // which may be what is wrong
	e.Msg = clearer(e.Msg, conf)
	out, err := json.Marshal(struct {
		CNIVersion string `json:"cniVersion"`
		*types.Error
	}{conf.version(), e})
	if err == nil {
		_, err = fmt.Println(string(out))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "print the error:", err)
	}
}

// basics are what an error of the library is about.
type basics struct {
	CNIVersion any
	Name       any
}

func (b basics) version() string {
	if v, ok := b.CNIVersion.(string); ok && v != "" {
		return v
	}
	return version.Current()
}

// peek reads the configuration ahead of the library, and puts it back.
func peek() []byte {
	if verb := os.Getenv("CNI_COMMAND"); verb == "VERSION" || verb == "" {
		return nil // which the library reads no configuration for
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil // an error then says no version; the library reads as ever
	}
	stdin, _ := io.ReadAll(os.Stdin)
	go func() {
		_, _ = w.Write(stdin)
		w.Close()
	}()
	os.Stdin = r
	return stdin
}

// clearer puts the variable or key and its value into a message of the library, as
// the specification asks of code 4, and what is right.
func clearer(msg string, conf basics) string {
	const name = "must begin with a letter or a digit, and have none but these, _, . and - after it"
	switch {
	case strings.HasSuffix(msg, " in containerID"):
		return fmt.Sprintf("CNI_CONTAINERID: %q: %s", os.Getenv("CNI_CONTAINERID"), name)
	case strings.HasPrefix(msg, "interface name"):
		return fmt.Sprintf("CNI_IFNAME: %q: must be a link's name: 1 to 15 characters, no blank, / or :", os.Getenv("CNI_IFNAME"))
	case strings.HasPrefix(msg, "missing network name"), strings.HasSuffix(msg, " in network name"):
		return fmt.Sprintf("network configuration: name: %v: must name the network: it %s", conf.Name, name)
	case msg == "incompatible CNI versions", strings.HasSuffix(msg, "does not allow "+os.Getenv("CNI_COMMAND")):
		return fmt.Sprintf("network configuration: cniVersion: %q: must be one of %s; CHECK needs 0.4.0 or later, STATUS and GC 1.1.0",
			conf.version(), strings.Join(version.All.SupportedVersions(), ", "))
	}
	return msg
}
