// A certified OpenID Connect provider on a port of this machine. Arguments: the module of oidc-provider.
// Prints its issuer URL as one line of JSON. Signs access tokens for the resource urn:rs256 or urn:es256 accordingly.
import { generateKeyPairSync } from 'node:crypto';
import http from 'node:http';

const { Provider } = await import(process.argv[2]);

function jwk(type, options, kid) {
  const { privateKey } = generateKeyPairSync(type, options);
  return { ...privateKey.export({ format: 'jwk' }), kid, use: 'sig' };
}

const keys = [jwk('rsa', { modulusLength: 2048 }, 'rsa'), jwk('ec', { namedCurve: 'P-256' }, 'ec')];
const server = http.createServer();

server.listen(0, '127.0.0.1', () => {
  const issuer = `http://127.0.0.1:${server.address().port}`;
  const provider = new Provider(issuer, {
    clients: [{
      client_id: 'app',
      client_secret: 'app-secret',
      grant_types: ['client_credentials'],
      redirect_uris: [],
      response_types: [],
    }],
    jwks: { keys },
    cookies: { keys: ['a-key-for-cookies'] },
    scopes: ['generate'],
    extraTokenClaims: () => ({ org: 'o-acme', groups: ['users'] }),
    features: {
      clientCredentials: { enabled: true },
      devInteractions: { enabled: false },
      resourceIndicators: {
        enabled: true,
        getResourceServerInfo: (ctx, resource) => ({
          scope: 'generate',
          audience: 'inferflux',
          accessTokenFormat: 'jwt',
          jwt: { sign: { alg: resource === 'urn:es256' ? 'ES256' : 'RS256' } },
        }),
      },
    },
  });
  server.on('request', provider.callback());
  console.log(JSON.stringify({ issuer }));
});
