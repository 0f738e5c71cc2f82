// stripe-sync-engine behind a small Fastify server: the raw body and the signature go to the library.
//
// It never calls Stripe: no lists are completed, nothing related is fetched, nothing is read again.
// `migrate` as the first argument makes its tables and ends. CommonJS, because the library's own migrations only run
// from its CommonJS build.

const { fastify } = require('fastify')
const { pino } = require('pino')
const { StripeSync, runMigrations } = require('@supabase/stripe-sync-engine')

const logger = pino()
const databaseUrl = process.env.DATABASE_URL

async function serve() {
  const sync = new StripeSync({
    schema: 'stripe',
    poolConfig: { connectionString: databaseUrl, max: 10, keepAlive: true },
    stripeSecretKey: 'sk_test_benchmark',
    stripeWebhookSecret: process.env.STRIPE_WEBHOOK_SECRET,
    autoExpandLists: false,
    backfillRelatedEntities: false,
    revalidateObjectsViaStripeApi: [],
    logger,
  })

  const app = fastify({ loggerInstance: logger, disableRequestLogging: true, bodyLimit: 1048576 })
  app.addContentTypeParser('application/json', { parseAs: 'buffer' }, (request, body, done) => done(null, body))
  app.post('/webhooks', async (request, reply) => {
    try {
      await sync.processWebhook(request.body, request.headers['stripe-signature'])
    } catch (error) {
      logger.error(error, 'webhook refused')
      return reply.code(400).send(`Webhook Error: ${error.message}`)
    }
    return { received: true }
  })
  await app.listen({ host: '127.0.0.1', port: Number(process.env.PORT) })
}

const work = process.argv[2] === 'migrate' ? runMigrations({ databaseUrl, schema: 'stripe', logger }) : serve()
work.catch((error) => {
  logger.error(error)
  process.exit(1)
})
