{{- define "vllm-router.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{ .Release.Name | trunc 53 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 53 | trimSuffix "-" }}
{{- end -}}
{{- end }}

{{- define "vllm-router.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "vllm-router.labels" -}}
{{ include "vllm-router.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "vllm-router.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ .Values.serviceAccount.name | default (include "vllm-router.fullname" .) }}
{{- else -}}
{{ .Values.serviceAccount.name | default "default" }}
{{- end -}}
{{- end }}

{{- define "vllm-router.image" -}}
{{- if .Values.image.digest -}}
{{ printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else -}}
{{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) }}
{{- end -}}
{{- end }}

{{- /* Values are read as floating-point numbers; TOML tells 64 and 64.0 apart. */ -}}
{{- define "vllm-router.toml" -}}
{{ regexReplaceAll "(?m)= (-?[0-9]+)\\.0$" (toToml .Values.config) "= ${1}" }}
{{- end }}

{{- /* Seconds: both parts of the drain, and some for the end of the process. */ -}}
{{- define "vllm-router.gracePeriod" -}}
{{- $config := .Values.config.config | default dict -}}
{{- $grace := dig "drain_grace" 0 $config -}}
{{- $timeout := dig "drain_timeout" 30 $config -}}
{{ int (ceil (addf $grace $timeout 10)) }}
{{- end }}
