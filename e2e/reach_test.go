package e2e

import (
	"testing"
)

func TestReachFirst(t *testing.T) {
	c, _ := startCluster(t, Options{Hosts: 3, Config: ConfigDual})
	onePod(t, c)
}
