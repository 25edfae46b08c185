{{- define "locket.name" -}}
{{- if contains "locket" .Release.Name -}}{{ .Release.Name | trunc 53 | trimSuffix "-" }}
{{- else -}}{{ printf "%s-locket" .Release.Name | trunc 53 | trimSuffix "-" }}{{- end -}}
{{- end -}}

{{- define "locket.selector" -}}
app.kubernetes.io/name: locket
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "locket.labels" -}}
{{ include "locket.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "locket.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ if .Values.gpus }}-cuda{{ end }}
{{- end -}}

{{- /* Name of the secret with the key file; empty without keys. */ -}}
{{- define "locket.keys" -}}
{{- if .Values.keys.existingSecret -}}{{ .Values.keys.existingSecret }}
{{- else if .Values.keys.file -}}{{ include "locket.name" . }}-keys{{- end -}}
{{- end -}}
