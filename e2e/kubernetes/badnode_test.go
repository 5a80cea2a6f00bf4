package kubernetes

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/twill-net/twill/pkg/nettest"
)

// badCredentials has twilld use a kubeconfig, whose parts become wrong one by one.
func (b *bad) badCredentials(t *testing.T) {
	token := strings.TrimSpace(b.twillctl(t, "create", "token", "twill", "--duration=1h"))
	ca, err := os.ReadFile(b.file("ca.crt"))
	must(t, err)
	write := func(n *Node, ca []byte, token string) {
		t.Helper()
		n.shell(t, fmt.Sprintf(`cat >/run/flannel/kubeconfig.new <<'.' && mv /run/flannel/kubeconfig.new /run/flannel/kubeconfig
apiVersion: v1
kind: Config
clusters: [{name: lab, cluster: {server: "%s", certificate-authority-data: %s}}]
users: [{name: twill, user: {token: %s}}]
contexts: [{name: lab, context: {cluster: lab, user: twill}}]
current-context: lab
.
`, b.server(), base64.StdEncoding.EncodeToString(ca), token))
	}
	for _, n := range b.Nodes {
		write(n, ca, token)
	}
	b.install(t, "--set", "twill.args={--kubeconfig-file=/run/flannel/kubeconfig}")
	b.healed(t)

	stranger := t.TempDir()
	_, err = nettest.NewCA(stranger, "ca")
	must(t, err)
	wrong, err := os.ReadFile(stranger + "/ca.crt")
	must(t, err)
	n2 := b.Nodes[1]
	for _, fault := range []struct {
		ca    []byte
		token string
		words []string
	}{
		{wrong, token, []string{
			"Kubernetes API " + b.server() + ": its certificate is of an authority that we do not trust",
			"the authority must be that in certificate-authority of kubeconfig /run/flannel/kubeconfig",
		}},
		{ca, b.expiredToken(t), []string{
			"the API at " + b.server() + " does not accept the token in kubeconfig /run/flannel/kubeconfig: expired, revoked, or of another cluster; renew it",
		}},
	} {
		write(n2, fault.ca, fault.token)
		b.restart(t)
		b.logs(t, "twilld", fault.words...)
		b.unharmed(t)
		write(n2, ca, token)
		b.healed(t)
	}
	b.install(t, "--reset-values")
	b.healed(t)
}

// expiredToken is a token of twilld's service account, signed by the cluster's key, that
// has ended.
func (b *bad) expiredToken(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(b.file("service-accounts.key"))
	must(t, err)
	block, _ := pem.Decode(text)
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		key, err = x509.ParseECPrivateKey(block.Bytes)
	}
	must(t, err)
	encode := base64.RawURLEncoding.EncodeToString
	end := time.Now().Add(-time.Hour).Unix()
	signed := encode([]byte(`{"alg":"ES256"}`)) + "." + encode(fmt.Appendf(nil,
		`{"iss":"https://kubernetes.default.svc.cluster.local","aud":["https://kubernetes.default.svc.cluster.local"],"sub":"system:serviceaccount:twill-system:twill","iat":%d,"nbf":%[1]d,"exp":%d,"kubernetes.io":{"namespace":"twill-system","serviceaccount":{"name":"twill","uid":"x"}}}`,
		end-3600, end))
	digest := sha256.Sum256([]byte(signed))
	r, s, err := ecdsa.Sign(rand.Reader, key.(*ecdsa.PrivateKey), digest[:])
	must(t, err)
	return signed + "." + encode(append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...)) // RFC 7518
}

// readOnly: the init container says why the plugin cannot be put in place, and netctl
// install passes it on.
func (b *bad) readOnly(t *testing.T) {
	n2 := b.Nodes[1]
	n2.shell(t, "mv /opt/cni/bin/twill /run/twill.kept; mount -o remount,ro,bind /opt/cni/bin")
	b.restart(t)
	words := []string{"/host/opt/cni/bin", "read-only file system: the file system is mounted read-only: remount it, or name another directory"}
	b.logs(t, "install-cni", words...)
	b.says(t, "kubectl describe pod", func(context.Context) (string, error) {
		return b.Kubectl("describe", "pod", "--namespace=twill-system", b.twilldPod(t).Name)
	}, words...)
	_, ref, err := b.Image()
	must(t, err)
	_, err = b.NetctlInstall(b.NetConf(), "--image", ref, "--wait=2s")
	checkError(t, "netctl install", err, append(words, "n2: install-cni ended with code 1")...)
	n2.shell(t, "mount -o remount,rw,bind /opt/cni/bin")
	b.healed(t)
	n2.shell(t, "rm /run/twill.kept")
}

func checkError(t *testing.T, who string, err error, words ...string) {
	t.Helper()
	for _, word := range words {
		if err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%s says %v, want %q", who, err, word)
		}
	}
}

// otherFirst: somebody's configuration is taken before ours.
func (b *bad) otherFirst(t *testing.T) {
	n2 := b.Nodes[1]
	const file = "/etc/cni/net.d/05-other.conflist"
	n2.shell(t, `echo '{"cniVersion": "1.0.0", "name": "other", "plugins": [{"type": "otherplugin"}]}' >`+file)
	b.restart(t)
	b.logs(t, "install-cni", "warning: ", "05-other.conflist comes before 10-twill.conflist, so pods get the network of otherplugin: rename it")
	b.unharmed(t)
	n2.shell(t, "rm "+file)
	b.restart(t)
	b.healed(t)
}

// bothFlavours: half of the node's rules are in the other flavour of iptables.
func (b *bad) bothFlavours(t *testing.T) {
	n2 := b.Nodes[1]
	rule := "-s 203.0.113.7 -j DROP"
	n2.shell(t, "for c in iptables-nft iptables-legacy; do $c -A INPUT "+rule+"; done")
	b.problem(t, "n2", "iptables", "both flavours are in use, and packets must pass both", "1 in iptables-legacy", "update-alternatives --set iptables /usr/sbin/iptables-nft")
	b.unharmed(t)
	n2.shell(t, "for c in iptables-nft iptables-legacy; do $c -D INPUT "+rule+"; done")
	b.healed(t)
}
