package kubernetes

import "fmt"

// WebManifest is a DaemonSet "web" with a pod on every node that serves its own name and
// its client's address on port 8080, on the node's port 8088 (hostPort), and as the
// Services web (ClusterIP, port 80), web-nodeport (30080) and web-local (30081, with
// externalTrafficPolicy Local).
func (c *Cluster) WebManifest() string {
	families, policy := "[IPv4]", "SingleStack"
	switch c.opts.Stack {
	case IPv6:
		families = "[IPv6]"
	case DualStack:
		families, policy = "[IPv4, IPv6]", "RequireDualStack"
	}
	return fmt.Sprintf(webManifest, AgnhostImage, families, policy)
}

const webManifest = `apiVersion: apps/v1
kind: DaemonSet
metadata: {name: web}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
      - name: web
        image: %[1]s
        args: [netexec, --http-port=8080, --udp-port=8080]
        ports: [{containerPort: 8080, hostPort: 8088}]
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ipFamilyPolicy: %[3]s, ipFamilies: %[2]s, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: web-nodeport}
spec: {type: NodePort, selector: {app: web}, ipFamilyPolicy: %[3]s, ipFamilies: %[2]s, ports: [{port: 80, targetPort: 8080, nodePort: 30080}]}
---
apiVersion: v1
kind: Service
metadata: {name: web-local}
spec: {type: NodePort, externalTrafficPolicy: Local, selector: {app: web}, ipFamilyPolicy: %[3]s, ipFamilies: %[2]s, ports: [{port: 80, targetPort: 8080, nodePort: 30081}]}
`
