{{- define "twill.labels" -}}
app.kubernetes.io/name: twill
{{- end }}

{{- define "twill.image" -}}
{{ .Values.twill.image.repository }}:{{ .Values.twill.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* The key under which a backend keeps its port, if it has one. */ -}}
{{- define "twill.portKey" -}}
{{- get (dict "vxlan" "Port" "udp" "Port" "wireguard" "ListenPort") .Values.twill.backend -}}
{{- end }}

{{- define "twill.netConf" -}}
{{- if .Values.twill.netConfJson -}}
{{ .Values.twill.netConfJson }}
{{- else -}}
{{- if not (or .Values.podCidr .Values.podCidrv6) }}{{ fail "podCidr and podCidrv6 are both empty: name the pods' network" }}{{ end -}}
{{- $t := .Values.twill -}}
{{- $backend := dict "Type" $t.backend -}}
{{- $port := include "twill.portKey" . -}}
{{- if and $port $t.backendPort }}{{ $_ := set $backend $port (int $t.backendPort) }}{{ end -}}
{{- if eq $t.backend "vxlan" }}{{ $_ := set $backend "VNI" (int $t.vni) }}{{ end -}}
{{- if and $t.directRouting (has $t.backend (list "vxlan" "ipip")) }}{{ $_ := set $backend "DirectRouting" true }}{{ end -}}
{{- if $t.mtu }}{{ $_ := set $backend "MTU" (int $t.mtu) }}{{ end -}}
{{- $conf := dict "Backend" (merge (deepCopy $t.backendOptions) $backend) -}}
{{- if .Values.podCidr }}{{ $_ := set $conf "Network" .Values.podCidr }}{{ else }}{{ $_ := set $conf "EnableIPv4" false }}{{ end -}}
{{- if .Values.podCidrv6 }}{{ $_ := set $conf "IPv6Network" .Values.podCidrv6 }}{{ $_ := set $conf "EnableIPv6" true }}{{ end -}}
{{- if $t.enableNFTables }}{{ $_ := set $conf "EnableNFTables" true }}{{ end -}}
{{- merge (deepCopy $t.netConf) $conf | toPrettyJson }}
{{- end -}}
{{- end }}

{{- /* Where the kubelet, which is on the host, reaches the probes. */ -}}
{{- define "twill.probeHost" -}}
{{- if has .Values.twill.healthzIP (list "0.0.0.0" "::") }}127.0.0.1{{ else }}{{ .Values.twill.healthzIP }}{{ end -}}
{{- end }}
