// All images: docker buildx bake --file deploy/docker/docker-bake.hcl
// With a bill of materials and provenance each: docker buildx bake --file deploy/docker/docker-bake.hcl sbom --push

variable "PREFIX" { default = "ghcr.io/inferflux" }
variable "TAG" { default = "0.1.0" }

group "default" { targets = ["image"] }

group "sbom" { targets = ["attested"] }

target "image" {
  name       = "inferflux-${service}"
  matrix     = { service = ["gateway", "policy", "registry", "guardrails", "prefill", "decode", "prefill-gpu", "decode-gpu"] }
  context    = "."
  dockerfile = "deploy/docker/Dockerfile"
  target     = service
  tags       = ["${PREFIX}/inferflux-${service}:${TAG}"]
}

target "attested" {
  name     = "attested-${service}"
  matrix   = { service = ["gateway", "policy", "registry", "guardrails", "prefill", "decode", "prefill-gpu", "decode-gpu"] }
  inherits = ["inferflux-${service}"]
  attest   = ["type=sbom", "type=provenance,mode=max"]
}
