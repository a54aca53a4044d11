# The vLLM servers are a service of Nomad's own catalogue; Nomad writes their addresses into a file
# that the router reads. Nomad replaces the file by rename, and the router needs no signal.
job "vllm-router" {
  datacenters = ["*"]

  group "router" {
    count = 2

    network {
      port "http" { to = 8888 }
    }

    service {
      name     = "vllm-router"
      port     = "http"
      provider = "nomad"

      check {
        type     = "http"
        path     = "/readyz"
        interval = "5s"
        timeout  = "2s"
      }
    }

    task "router" {
      driver       = "docker"
      kill_timeout = "40s" # drain_timeout is 30 s

      config {
        image   = "registry.example/vllm-router:latest"
        args    = ["run", "--console", "--config", "/local/servers.toml"]
        ports   = ["http"]
      }

      template {
        destination = "local/servers.toml"
        change_mode = "noop"
        data        = <<-EOF
          [discovery]
          file = { path = "targets.json", defaults = { max_concurrent_requests = 64 } }
        EOF
      }

      template {
        destination = "local/targets.json"
        change_mode = "noop"
        data        = <<-EOF
          [{"targets": [{{ range $i, $s := nomadService "vllm" }}{{ if $i }}, {{ end }}"{{ $s.Address }}:{{ $s.Port }}"{{ end }}]}]
        EOF
      }
    }
  }
}
