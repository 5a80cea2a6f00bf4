package overlay

import (
	"net/netip"
	"time"
)

// Status is what twilld says of itself over its local API: the whole truth that
// netctl and /readyz are made from.
type Status struct {
	Version string    `json:"version"`
	Started time.Time `json:"started"`
	PID     int       `json:"pid"`

	Ready  bool   `json:"ready"`
	Reason string `json:"reason"` // why it is not ready; or "ok"

	Store  StoreStatus `json:"store"`
	Uplink Uplink      `json:"uplink"`
	// Lease is the key of the node's lease, empty until there is one.
	Lease      string         `json:"lease"`
	PublicIP   netip.Addr     `json:"publicIP"`
	PublicIPv6 netip.Addr     `json:"publicIPv6"`
	Networks   []netip.Prefix `json:"networks"`
	Subnets    []netip.Prefix `json:"subnets"`
	Backend    string         `json:"backend"`
	PodMTU     int            `json:"podMTU"`
	Peers      int            `json:"peers"` // leases other than ours

	Pass     PassStatus `json:"pass"`
	Problems []Problem  `json:"problems"`
	Drifts   uint64     `json:"drifts"` // repaired since the start
}

// StoreStatus is the state of the connection to the lease store.
type StoreStatus struct {
	Kind      string    `json:"kind"`           // etcd or kubernetes
	Node      string    `json:"node,omitempty"` // this node's name, where the store knows nodes by name
	Endpoints []string  `json:"endpoints"`
	Prefix    string    `json:"prefix"`
	Connected bool      `json:"connected"`
	Since     time.Time `json:"since"` // of being connected or not
	Revision  int64     `json:"revision"`
	Error     string    `json:"error,omitempty"` // the last one, while not connected
	// CAFile, CertFile and KeyFile let netctl read the same store.
	CAFile   string `json:"caFile,omitempty"`
	CertFile string `json:"certFile,omitempty"`
	KeyFile  string `json:"keyFile,omitempty"`
	Username string `json:"username,omitempty"`
	// So do these, where the store is Kubernetes.
	InCluster  bool   `json:"inCluster,omitempty"`  // by the pod's service account
	Kubeconfig string `json:"kubeconfig,omitempty"` // file
	NetConfig  string `json:"netConfig,omitempty"`  // file with the network configuration
}

// PassStatus tells of the last pass of the reconcile loop.
type PassStatus struct {
	At       time.Time     `json:"at"`
	Count    uint64        `json:"count"`
	Why      string        `json:"why"` // what woke it
	Took     time.Duration `json:"tookNanoseconds"`
	Changes  int           `json:"changes"`
	Failures []string      `json:"failures"` // changes the kernel refused
	LastFull time.Time     `json:"lastFull"` // last time the whole kernel state was read
}

// Drift is one repaired deviation of the kernel from what the daemon had set.
type Drift struct {
	Time   time.Time `json:"time"`
	Kind   string    `json:"kind"`   // link, addr, nexthop, route, neigh, fdb, sysctl, chain
	What   string    `json:"what"`   // the object, in ip(8) words
	Before string    `json:"before"` // what was found: "absent", or the object as it was
	After  string    `json:"after"`  // what it is now: the object, or "absent"
	Why    string    `json:"why"`    // what rang the bell
}

// BGPStatus is what the speaker says of itself, for netctl bgp.
type BGPStatus struct {
	ASNumber  uint32       `json:"asNumber"`
	RouterID  netip.Addr   `json:"routerID"`
	ClusterID netip.Addr   `json:"clusterID"` // of a route reflector
	Speaker   string       `json:"speaker"`   // gobgp, bird or frr
	Settled   bool         `json:"settled"`   // every neighbour has told all it knows, or had the time to
	Sessions  []BGPSession `json:"sessions"`
	Received  []BGPRoute   `json:"received"`
	Announced []BGPOwn     `json:"announced"`
}

// BGPSession is one session as it stands.
type BGPSession struct {
	Neighbor    BGPNeighbor   `json:"neighbor"` // its password left out
	State       string        `json:"state"`    // idle, connect, active, opensent, openconfirm, established (RFC 4271)
	Since       time.Time     `json:"since"`
	Uptime      time.Duration `json:"uptimeNanoseconds"`
	Received    uint64        `json:"received"` // prefixes the neighbour announces
	Accepted    uint64        `json:"accepted"` // of them accepted by the filters
	Announced   uint64        `json:"announced"`
	MessagesIn  uint64        `json:"messagesIn"`
	MessagesOut uint64        `json:"messagesOut"`
	Flaps       uint64        `json:"flaps"`
	Error       string        `json:"error,omitempty"` // why it is not established, in words an operator can act on
}

// PathMTU is what the probe found of the way to a peer.
type PathMTU struct {
	Peer    netip.Addr `json:"peer"`
	Lease   string     `json:"lease"`
	Needed  int        `json:"needed"`  // bytes of the largest outer packet
	Carries int        `json:"carries"` // the largest that was answered; 0: none was, nothing is known
	At      time.Time  `json:"at"`
}
